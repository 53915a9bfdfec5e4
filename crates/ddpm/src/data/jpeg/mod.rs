//! Whether a JPEG is whole: its markers are followed, and the blocks of each scan counted (ITU-T T.81).
//!
//! The decoder fills what is missing with grey, which would go into the training unnoticed; and what follows the image
//! (a film, a second image, a camera's notes) says nothing about it: it may hold end markers of its own, or none.

mod scan;

use std::ops::Range;

use scan::{Band, Bits, Stop, Table};

/// Scans after which the decoder refuses the file itself.
const MAX_SCANS: usize = 100;
/// Equal bytes between the blocks of a scan and the next marker: some encoders pad.
const MAX_PADDING: usize = 64;
/// Other bytes there.
const MAX_REST: usize = 4;
/// Bytes at the end of a scan that may look like text that follows it: by chance more do in one of five thousand.
const MAX_ALIKE: usize = 8;
/// The marker of the end.
const END: u8 = 0xD9;
/// Blocks of an image that are counted; what has more, the decoder refuses.
const MAX_BLOCKS: usize = 1 << 24;

/// A component of the frame.
struct Component {
    id: u8,
    h: usize,
    v: usize,
    /// Per coefficient, the position of the lowest bit that is known; nothing before its first scan.
    low: [Option<u8>; 64],
    /// Per block, a bit for each coefficient that is not 0; only of progressive images.
    nonzero: Vec<u64>,
}

/// The frame's header.
struct Frame {
    progressive: bool,
    height: usize,
    width: usize,
    components: Vec<Component>,
}

impl Frame {
    /// Reads the segment of a frame; nothing for frames whose blocks are not counted.
    fn read(marker: u8, segment: &[u8]) -> Option<Self> {
        let (&[8, y1, y0, x1, x0, n], rest) = segment.split_first_chunk::<6>()? else { return None };
        let components: Vec<_> = rest
            .chunks_exact(3)
            .take(n.into())
            .map(|c| Component {
                id: c[0],
                h: (c[1] >> 4).into(),
                v: (c[1] & 15).into(),
                low: [None; 64],
                nonzero: Vec::new(),
            })
            .collect();
        let (height, width) = (u16::from_be_bytes([y1, y0]).into(), u16::from_be_bytes([x1, x0]).into());
        let frame = Self { progressive: marker == 0xC2, height, width, components };
        let fits = frame.components.iter().all(|c| (1..=4).contains(&c.h) && (1..=4).contains(&c.v));
        let listed = n > 0 && frame.components.len() == usize::from(n);
        let counted = matches!(marker, 0xC0..=0xC2) && height > 0 && width > 0;
        (counted && fits && listed && frame.blocks() <= MAX_BLOCKS).then_some(frame)
    }

    fn most(&self) -> (usize, usize) {
        let most = |f: fn(&Component) -> usize| self.components.iter().map(f).max().unwrap_or(1);
        (most(|c| c.h), most(|c| c.v))
    }

    /// Columns and rows of a component's blocks.
    fn grid(&self, c: &Component) -> (usize, usize) {
        let (h, v) = self.most();
        ((self.width * c.h).div_ceil(h).div_ceil(8), (self.height * c.v).div_ceil(v).div_ceil(8))
    }

    fn blocks(&self) -> usize {
        self.components.iter().map(|c| self.grid(c)).map(|(w, h)| w * h).sum()
    }

    /// Whether every coefficient of every component has been told to its last bit.
    fn is_complete(&self) -> bool {
        self.components.iter().all(|c| c.low.iter().all(|&low| low == Some(0)))
    }
}

/// What is known where the walk has come to.
struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    frame: Option<Frame>,
    dc: [Option<Table>; 4],
    ac: [Option<Table>; 4],
    interval: usize,
    scans: usize,
    /// The place of the blank blocks at the end of the last scan, if any; nothing where its bits are not those of an end.
    blank: Option<Range<usize>>,
}

/// Whether the JPEG `bytes` has all of its image; if not, why, for a person.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    let (dc, ac) = (Default::default(), Default::default());
    Walk { bytes, at: 2, frame: None, dc, ac, interval: 0, scans: 0, blank: None }.go()
}

fn cut_off() -> String {
    "is cut off: the JPEG has no end".into()
}

fn ambiguous() -> String {
    "is cut off, or followed by data that cannot be told from its own: the JPEG has no end marker; open it in an image \
     editor, and if it is whole there save it again"
        .into()
}

/// Whether what follows a scan that ends with the blank blocks at `blank` was never a part of it: a marker, equal bytes, or
/// text.
///
/// What follows a cut scan is read as its blocks, and those can be as many as are missing: then the equal bytes, or the
/// text, begin before the end.
fn is_apart(bytes: &[u8], blank: &Range<usize>) -> bool {
    let end = blank.end;
    let begins =
        |belongs: &dyn Fn(u8) -> bool| bytes.iter().rposition(|&b| !belongs(b)).map_or(0, |at| at + 1);
    let text = |b: u8| matches!(b, 0 | b'\t' | b'\n' | b'\r' | b' '..=b'~');
    let next = bytes.get(end);
    // Where an image is flat at its end, the scan can have equal bytes there, and others are none of them.
    let first = bytes.get(blank.start);
    let flat = blank.len() >= MAX_ALIKE && bytes[blank.clone()].iter().all(|byte| Some(byte) == first);
    if next == Some(&0xFF) || (flat && next != first) {
        return true;
    }
    let last = bytes.last().copied().unwrap_or_default();
    let equal = begins(&|b| b == last);
    // The last byte of a scan can be any, and where nothing follows a few may be equal.
    let most = if end == bytes.len() { MAX_ALIKE } else { 1 };
    if equal <= end && (end > equal + most || !text(last)) {
        return end <= equal + most;
    }
    (end.saturating_sub(MAX_ALIKE)..=end).contains(&begins(&text))
}

impl<'a> Walk<'a> {
    fn go(mut self) -> Result<(), String> {
        loop {
            let marker = self.marker()?;
            match marker {
                END if self.scans == 0 => return Err("is cut off: the JPEG holds no image data".into()),
                END => {
                    return match &self.frame {
                        Some(frame) if !frame.is_complete() => {
                            Err("is cut off: the JPEG ends before its last scan".into())
                        }
                        _ => Ok(()),
                    };
                }
                // Nothing else stands alone outside of scans.
                0x01 | 0xD0..=0xD7 => continue,
                _ => {}
            }
            let Some(segment) = self.segment() else {
                return if self.is_whole() { Ok(()) } else { Err(cut_off()) };
            };
            match marker {
                0xC4 => self.tables(segment),
                // Frames: all of C0 to CF but the tables' C4 and CC and the reserved C8.
                0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF => {
                    self.frame = Frame::read(marker, segment)
                }
                0xDD => self.interval = segment.first_chunk().map_or(0, |&n| u16::from_be_bytes(n).into()),
                0xDA => {
                    self.scans += 1;
                    if self.scans > MAX_SCANS {
                        return Ok(());
                    }
                    self.scan(segment)?;
                }
                _ => {}
            }
        }
    }

    /// The segment behind a marker, if all of it is there.
    fn segment(&mut self) -> Option<&'a [u8]> {
        let rest = self.bytes.get(self.at..)?;
        let length = usize::from(u16::from_be_bytes(*rest.first_chunk()?)).max(2);
        self.at += length;
        rest.get(2..length)
    }

    /// The next marker; the end, too, where an image that is whole has no marker next.
    fn marker(&mut self) -> Result<u8, String> {
        self.written_marker().or_else(|reason| match self.blank {
            _ if self.is_whole() => Ok(END),
            Some(_) if self.is_complete() => Err(ambiguous()),
            _ => Err(reason),
        })
    }

    /// The marker that is next. Before the first scan anything may stand between segments; behind a scan only padding.
    fn written_marker(&mut self) -> Result<u8, String> {
        let start = self.at;
        let counted = self.scans > 0 && self.frame.is_some();
        loop {
            match self.bytes.get(self.at..) {
                None | Some([] | [_]) => return Err(cut_off()),
                // Fill bytes, and a stuffed one in the rest of a scan.
                Some([0xFF, 0xFF, ..]) => self.at += 1,
                Some([0xFF, 0x00, ..]) => self.at += 2,
                Some([0xFF, marker, ..]) => {
                    let marker = *marker;
                    self.at += 2;
                    let between =
                        matches!(marker, 0xC4 | 0xCC | 0xD0..=0xD7 | 0xD9..=0xDD | 0xE0..=0xEF | 0xFE);
                    return if self.scans == 0 || between { Ok(marker) } else { Err(cut_off()) };
                }
                Some(_) => self.at += 1,
            }
            let skipped = &self.bytes[start..self.at];
            let uniform = skipped.iter().all(|byte| Some(byte) == skipped.first());
            if counted && (skipped.len() > MAX_PADDING || (skipped.len() > MAX_REST && !uniform)) {
                return Err(cut_off());
            }
        }
    }

    /// Whether all blocks have been seen to their last bit.
    fn is_complete(&self) -> bool {
        self.frame.as_ref().is_some_and(Frame::is_complete)
    }

    /// Whether that is so and what follows them is not part of them.
    fn is_whole(&self) -> bool {
        self.is_complete() && self.blank.as_ref().is_some_and(|blank| is_apart(self.bytes, blank))
    }

    /// Reads Huffman tables. One that is not right is none, and the decoder's business.
    fn tables(&mut self, mut segment: &[u8]) {
        while let Some((&[class, ref lengths @ ..], rest)) = segment.split_first_chunk::<17>() {
            let n: usize = lengths.iter().map(|&n| usize::from(n)).sum();
            let Some((symbols, rest)) = rest.split_at_checked(n) else { return };
            let place = if class >> 4 == 0 { &mut self.dc } else { &mut self.ac };
            if let Some(place) = place.get_mut(usize::from(class & 15)) {
                *place = Table::new(lengths, symbols);
            }
            segment = rest;
        }
    }

    /// Goes through a scan and counts its blocks.
    fn scan(&mut self, header: &[u8]) -> Result<(), String> {
        let mut bits = Bits::new(self.bytes, self.at);
        let counted = self.count(header, &mut bits);
        self.blank = bits.is_exact().then(|| bits.blank()..bits.end());
        self.at = bits.at();
        match counted {
            Some((_, Err(Stop::Invalid))) => {
                Err("is damaged: its compressed data have a code that is none".into())
            }
            Some((part, Err(Stop::End))) => {
                Err(format!("is cut off: the JPEG's data end after {:.0} % of a scan", 100.0 * part))
            }
            Some((_, Ok(()))) => Ok(()),
            // Blocks of another kind are the decoder's business, if it reads them: here only the end is looked for.
            None => {
                self.skip_scan();
                self.frame = None;
                Ok(())
            }
        }
    }

    /// Moves to the first marker that does not belong to a scan.
    fn skip_scan(&mut self) {
        while let Some(&[a, b]) = self.bytes.get(self.at..self.at + 2) {
            if a == 0xFF && !matches!(b, 0x00 | 0xFF | 0xD0..=0xD7) {
                return;
            }
            self.at += 1;
        }
    }

    /// What part of the scan's blocks there are, and why there are no more; nothing for a scan that cannot be followed.
    fn count(&mut self, header: &[u8], bits: &mut Bits<'_>) -> Option<(f64, Result<(), Stop>)> {
        let (&n, rest) = header.split_first()?;
        let (chosen, rest) = rest.split_at_checked(2 * usize::from(n))?;
        let &[first, last, bit] = rest.first_chunk()?;
        let frame = self.frame.as_mut()?;
        let progressive = frame.progressive;
        let band = match progressive {
            true => Band { first: first.into(), last: last.into(), high: bit >> 4, low: bit & 15 },
            false => Band { first: 0, last: 63, high: 0, low: 0 },
        };
        let single = n == 1;
        if band.last > 63 || band.first > band.last || (progressive && band.first == 0 && band.last > 0) {
            return None;
        }
        if band.first > 0 && !single {
            return None;
        }
        let mut parts = Vec::new();
        for pair in chosen.chunks_exact(2) {
            let at = frame.components.iter().position(|c| c.id == pair[0])?;
            let dc = self.dc.get(usize::from(pair[1] >> 4))?.as_ref();
            let ac = self.ac.get(usize::from(pair[1] & 15))?.as_ref();
            let needs_dc = band.first == 0 && band.high == 0;
            if (needs_dc && dc.is_none()) || ((!progressive || band.first > 0) && ac.is_none()) {
                return None;
            }
            parts.push((at, dc, ac));
        }
        let (h, v) = frame.most();
        let units = match parts[..] {
            [(at, ..)] => {
                let (w, h) = frame.grid(&frame.components[at]);
                w * h
            }
            _ => frame.width.div_ceil(8 * h) * frame.height.div_ceil(8 * v),
        };
        for &(at, ..) in &parts {
            let (w, h) = frame.grid(&frame.components[at]);
            let c = &mut frame.components[at];
            if band.first > 0 && c.nonzero.len() != w * h {
                c.nonzero = vec![0; w * h];
            }
            c.low[band.first..=band.last].fill(Some(band.low));
        }
        let mut run = 0;
        for unit in 0..units {
            if self.interval > 0 && unit > 0 && unit % self.interval == 0 {
                run = 0;
                bits.restart();
            }
            for (i, &(at, dc, ac)) in parts.iter().enumerate() {
                let c = &mut frame.components[at];
                let blocks = if single { 1 } else { c.h * c.v };
                for block in 1..=blocks {
                    let mut none = 0;
                    let nonzero = if band.first > 0 { &mut c.nonzero[unit] } else { &mut none };
                    let done = match progressive {
                        false => bits.block(dc, ac),
                        true => bits.progressive_block(&band, dc, ac, nonzero, &mut run),
                    };
                    match done {
                        Ok(()) => {}
                        // Some cameras leave out the last bits.
                        Err(Stop::End) if unit + 1 == units && i + 1 == parts.len() && block == blocks => {
                            return Some((1.0, Ok(())));
                        }
                        Err(stop) => return Some((unit as f64 / units as f64, Err(stop))),
                    }
                }
            }
        }
        Some((1.0, Ok(())))
    }
}

#[cfg(test)]
mod tests;
