//! Checks that a JPEG is complete by parsing its markers and counting the blocks of every scan (ITU-T T.81).
//!
//! The decoder fills missing data with grey, which would silently end up in the training data. Looking for an end marker at
//! the end of the file is not enough: trailing data (a video, a second image, camera metadata) may or may not contain one.

mod scan;

use std::ops::Range;

use scan::{BitReader, CoefficientBand, HuffmanTable, Stop};

/// The decoder rejects files with more scans.
const MAX_SCANS: usize = 100;
/// Maximum number of equal bytes between the blocks of a scan and the next marker: some encoders pad.
const MAX_PADDING: usize = 64;
/// Maximum number of other bytes there.
const MAX_JUNK: usize = 4;
/// Maximum number of bytes at the end of a scan that look like text after it: more do by chance in one of 5000 files.
const MAX_AMBIGUOUS: usize = 8;
/// The end-of-image (EOI) marker.
const END: u8 = 0xD9;
/// Maximum number of blocks per image; the decoder rejects larger images.
const MAX_BLOCKS: usize = 1 << 24;

/// A component of the frame.
struct Component {
    id: u8,
    h: usize,
    v: usize,
    /// Per coefficient, the position of the lowest bit decoded so far; `None` before its first scan.
    low: [Option<u8>; 64],
    /// Per block, a bit mask of the nonzero coefficients; only for progressive images.
    nonzero: Vec<u64>,
}

/// The frame header.
struct Frame {
    progressive: bool,
    height: usize,
    width: usize,
    components: Vec<Component>,
}

impl Frame {
    /// Parses a frame header; `None` for frames whose blocks cannot be counted.
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

    fn max_sampling(&self) -> (usize, usize) {
        let max = |f: fn(&Component) -> usize| self.components.iter().map(f).max().unwrap_or(1);
        (max(|c| c.h), max(|c| c.v))
    }

    /// Columns and rows of blocks of a component.
    fn grid(&self, c: &Component) -> (usize, usize) {
        let (h, v) = self.max_sampling();
        ((self.width * c.h).div_ceil(h).div_ceil(8), (self.height * c.v).div_ceil(v).div_ceil(8))
    }

    fn blocks(&self) -> usize {
        self.components.iter().map(|c| self.grid(c)).map(|(w, h)| w * h).sum()
    }

    /// Whether every coefficient of every component has been decoded to the last bit.
    fn is_complete(&self) -> bool {
        self.components.iter().all(|c| c.low.iter().all(|&low| low == Some(0)))
    }
}

/// The parser state.
struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
    frame: Option<Frame>,
    dc: [Option<HuffmanTable>; 4],
    ac: [Option<HuffmanTable>; 4],
    restart_interval: usize,
    scans: usize,
    /// The bytes of the empty blocks at the end of the last scan; `None` if the scan does not end in valid fill bits.
    blank: Option<Range<usize>>,
}

/// Checks that the JPEG `bytes` is complete; the error is a human-readable reason.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    let (dc, ac) = (Default::default(), Default::default());
    Parser { bytes, at: 2, frame: None, dc, ac, restart_interval: 0, scans: 0, blank: None }.run()
}

fn cut_off() -> String {
    "is cut off: the JPEG has no end".into()
}

fn ambiguous() -> String {
    "is cut off, or followed by data that cannot be distinguished from image data: the JPEG has no end marker; open it in an \
     image editor, and if it is complete there, save it again"
        .into()
}

/// Whether the bytes after a scan that ends with the empty blocks at `blank` are trailing data rather than a part of it: a
/// marker, equal bytes, or text.
///
/// After a truncated scan, trailing data is parsed as blocks, possibly as many as are missing: then the run of equal bytes or
/// text starts before the end of the scan.
fn is_trailing_data(bytes: &[u8], blank: &Range<usize>) -> bool {
    let end = blank.end;
    let begins =
        |belongs: &dyn Fn(u8) -> bool| bytes.iter().rposition(|&b| !belongs(b)).map_or(0, |at| at + 1);
    let text = |b: u8| matches!(b, 0 | b'\t' | b'\n' | b'\r' | b' '..=b'~');
    let next = bytes.get(end);
    // If the image ends in a flat area, the scan can end in equal bytes, and a different byte does not belong to it.
    let first = bytes.get(blank.start);
    let flat = blank.len() >= MAX_AMBIGUOUS && bytes[blank.clone()].iter().all(|byte| Some(byte) == first);
    if next == Some(&0xFF) || (flat && next != first) {
        return true;
    }
    let last = bytes.last().copied().unwrap_or_default();
    let equal = begins(&|b| b == last);
    // The last byte of a scan is arbitrary, and if nothing follows, a few may be equal by chance.
    let max_equal = if end == bytes.len() { MAX_AMBIGUOUS } else { 1 };
    if equal <= end && (end > equal + max_equal || !text(last)) {
        return end <= equal + max_equal;
    }
    (end.saturating_sub(MAX_AMBIGUOUS)..=end).contains(&begins(&text))
}

impl<'a> Parser<'a> {
    fn run(mut self) -> Result<(), String> {
        loop {
            let marker = self.marker_or_end()?;
            match marker {
                END if self.scans == 0 => return Err("is cut off: the JPEG contains no image data".into()),
                END => {
                    return match &self.frame {
                        Some(frame) if !frame.is_complete() => {
                            Err("is cut off: the JPEG ends before its last scan".into())
                        }
                        _ => Ok(()),
                    };
                }
                // The only other markers without a segment.
                0x01 | 0xD0..=0xD7 => continue,
                _ => {}
            }
            let Some(segment) = self.segment() else {
                return if self.is_complete_without_end() { Ok(()) } else { Err(cut_off()) };
            };
            match marker {
                0xC4 => self.tables(segment),
                // Frame headers: C0 to CF except C4 and CC (tables) and C8 (reserved).
                0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF => {
                    self.frame = Frame::read(marker, segment)
                }
                0xDD => {
                    self.restart_interval = segment.first_chunk().map_or(0, |&n| u16::from_be_bytes(n).into())
                }
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

    /// The segment after a marker, if it is complete.
    fn segment(&mut self) -> Option<&'a [u8]> {
        let rest = self.bytes.get(self.at..)?;
        let length = usize::from(u16::from_be_bytes(*rest.first_chunk()?)).max(2);
        self.at += length;
        rest.get(2..length)
    }

    /// The next marker; `END` if there is none but the image is complete.
    fn marker_or_end(&mut self) -> Result<u8, String> {
        self.next_marker().or_else(|reason| match self.blank {
            _ if self.is_complete_without_end() => Ok(END),
            Some(_) if self.is_complete() => Err(ambiguous()),
            _ => Err(reason),
        })
    }

    /// The next marker in the file. Before the first scan anything is allowed between segments; after a scan, only padding.
    fn next_marker(&mut self) -> Result<u8, String> {
        let start = self.at;
        let counted = self.scans > 0 && self.frame.is_some();
        loop {
            match self.bytes.get(self.at..) {
                None | Some([] | [_]) => return Err(cut_off()),
                // Fill bytes, and byte stuffing in the rest of a scan.
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
            if counted && (skipped.len() > MAX_PADDING || (skipped.len() > MAX_JUNK && !uniform)) {
                return Err(cut_off());
            }
        }
    }

    /// Whether all blocks have been decoded to the last bit.
    fn is_complete(&self) -> bool {
        self.frame.as_ref().is_some_and(Frame::is_complete)
    }

    /// Whether all blocks have been decoded and the bytes after them are trailing data.
    fn is_complete_without_end(&self) -> bool {
        self.is_complete() && self.blank.as_ref().is_some_and(|blank| is_trailing_data(self.bytes, blank))
    }

    /// Reads Huffman tables. Invalid ones are dropped; the decoder reports them.
    fn tables(&mut self, mut segment: &[u8]) {
        while let Some((&[class, ref lengths @ ..], rest)) = segment.split_first_chunk::<17>() {
            let n: usize = lengths.iter().map(|&n| usize::from(n)).sum();
            let Some((symbols, rest)) = rest.split_at_checked(n) else { return };
            let tables = if class >> 4 == 0 { &mut self.dc } else { &mut self.ac };
            if let Some(table) = tables.get_mut(usize::from(class & 15)) {
                *table = HuffmanTable::new(lengths, symbols);
            }
            segment = rest;
        }
    }

    /// Parses a scan and counts its blocks.
    fn scan(&mut self, header: &[u8]) -> Result<(), String> {
        let mut bits = BitReader::new(self.bytes, self.at);
        let counted = self.count(header, &mut bits);
        self.blank = bits.is_exact().then(|| bits.blank()..bits.end());
        self.at = bits.at();
        match counted {
            Some((_, Err(Stop::Invalid))) => {
                Err("is damaged: its compressed data contain an invalid code".into())
            }
            Some((part, Err(Stop::End))) => {
                Err(format!("is cut off: the JPEG's data end after {:.0} % of a scan", 100.0 * part))
            }
            Some((_, Ok(()))) => Ok(()),
            // Unsupported kinds of blocks are left to the decoder; only the end of the scan is searched for.
            None => {
                self.skip_scan();
                self.frame = None;
                Ok(())
            }
        }
    }

    /// Skips to the first marker that does not belong to a scan.
    fn skip_scan(&mut self) {
        while let Some(&[a, b]) = self.bytes.get(self.at..self.at + 2) {
            if a == 0xFF && !matches!(b, 0x00 | 0xFF | 0xD0..=0xD7) {
                return;
            }
            self.at += 1;
        }
    }

    /// The fraction of the scan's blocks that are present, and why counting stopped; `None` for a scan that cannot be parsed.
    fn count(&mut self, header: &[u8], bits: &mut BitReader<'_>) -> Option<(f64, Result<(), Stop>)> {
        let (&n, rest) = header.split_first()?;
        let (chosen, rest) = rest.split_at_checked(2 * usize::from(n))?;
        let &[first, last, bit] = rest.first_chunk()?;
        let frame = self.frame.as_mut()?;
        let progressive = frame.progressive;
        let band = if progressive {
            CoefficientBand { first: first.into(), last: last.into(), high: bit >> 4, low: bit & 15 }
        } else {
            CoefficientBand { first: 0, last: 63, high: 0, low: 0 }
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
        let (h, v) = frame.max_sampling();
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
            if self.restart_interval > 0 && unit > 0 && unit % self.restart_interval == 0 {
                run = 0;
                bits.restart();
            }
            for (i, &(at, dc, ac)) in parts.iter().enumerate() {
                let c = &mut frame.components[at];
                let blocks = if single { 1 } else { c.h * c.v };
                for block in 1..=blocks {
                    let mut none = 0;
                    let nonzero = if band.first > 0 { &mut c.nonzero[unit] } else { &mut none };
                    let done = if progressive {
                        bits.progressive_block(&band, dc, ac, nonzero, &mut run)
                    } else {
                        bits.block(dc, ac)
                    };
                    match done {
                        Ok(()) => {}
                        // Some cameras omit the last bits.
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
