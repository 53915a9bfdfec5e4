//! The blocks of a scan: Huffman codes are read, and what they stand for is passed over.

/// Bits of a code that are looked up at once; longer codes are compared length by length.
const LOOKUP: u32 = 9;

/// Why a scan cannot be followed further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// Its bits are used up.
    End,
    /// There is a code that no table has, or coefficients beyond the last.
    Invalid,
}

/// The coefficients of a scan of a progressive image, and which of their bits.
pub(super) struct Band {
    pub first: usize,
    pub last: usize,
    /// 0 in the first scan of these coefficients, else the bit before.
    pub high: u8,
    pub low: u8,
}

/// A Huffman table.
pub(super) struct Table {
    /// Length and symbol for each start of a code; length 0 for longer ones.
    quick: Box<[(u8, u8); 1 << LOOKUP]>,
    /// Per length: the first code behind the codes of that length, shifted to 16 bits; where its symbols begin, less the first code.
    limits: [(u32, i32); 17],
    symbols: Vec<u8>,
}

impl Table {
    /// A table with so many codes of each length from 1 to 16; nothing where there are more codes than bits allow.
    pub fn new(lengths: &[u8; 16], symbols: &[u8]) -> Option<Self> {
        let (mut code, mut at) = (0u32, 0usize);
        let mut table =
            Self { quick: Box::new([(0, 0); 1 << LOOKUP]), limits: [(0, 0); 17], symbols: symbols.to_vec() };
        for (length, &n) in (1u32..).zip(lengths) {
            let first = code;
            table.limits[length as usize].1 = at as i32 - first as i32;
            for _ in 0..n {
                if code >> length != 0 {
                    return None;
                }
                if length <= LOOKUP {
                    let start = (code << (LOOKUP - length)) as usize;
                    table.quick[start..start + (1 << (LOOKUP - length))]
                        .fill((length as u8, *symbols.get(at)?));
                }
                (code, at) = (code + 1, at + 1);
            }
            table.limits[length as usize].0 = code << (16 - length);
            code <<= 1;
        }
        Some(table)
    }

    /// Length and symbol of the code that the 16 bits begin with.
    fn find(&self, bits: u32) -> Option<(u32, u8)> {
        let (length, symbol) = self.quick[(bits >> (16 - LOOKUP)) as usize];
        if length > 0 {
            return Some((length.into(), symbol));
        }
        let length = (LOOKUP + 1..=16).find(|&length| bits < self.limits[length as usize].0)?;
        let at = (bits >> (16 - length)) as i32 + self.limits[length as usize].1;
        Some((length, *self.symbols.get(usize::try_from(at).ok()?)?))
    }
}

/// The bits of a scan, without what is stuffed into them, up to the next marker.
pub(super) struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
    held: u64,
    count: u32,
    /// Whether more bits, or restart markers, were asked for than there were.
    ended: bool,
    /// `at` and `count` behind the last bits that were no code of a table.
    told: (usize, u32),
}

impl<'a> Bits<'a> {
    pub fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at, held: 0, count: 0, ended: false, told: (at, 0) }
    }

    /// The place of the next byte that was not taken in: never behind the marker that ends the bits.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Whether all that was asked for was there, and the rest of the last byte is filled as encoders fill it.
    pub fn is_exact(&self) -> bool {
        let rest = self.count % 8;
        let filler = (1u64 << rest) - 1;
        !self.ended && (rest == 0 || [0, filler].contains(&(self.held >> (self.count - rest) & filler)))
    }

    /// The place behind the last byte that a bit was taken of.
    pub fn end(&self) -> usize {
        self.place(self.at, self.count)
    }

    /// The place from which on there are only codes without further bits: those of blocks that add nothing.
    pub fn blank(&self) -> usize {
        self.place(self.told.0, self.told.1)
    }

    /// The place behind the last byte that a bit was taken of, where `count` bits were held of those before `at`.
    fn place(&self, mut at: usize, count: u32) -> usize {
        // Back over what was only looked at: the bytes that are held, as they stand in the file.
        let mut held = count / 8;
        while held > 0 {
            match self.bytes[..at] {
                [.., 0xFF, 0x00] => (at, held) = (at - 2, held - 1),
                // A fill byte before a marker.
                [.., 0xFF] => at -= 1,
                _ => (at, held) = (at - 1, held - 1),
            }
        }
        at
    }

    fn fill(&mut self) {
        while self.count <= 56 {
            let byte = match self.bytes.get(self.at..) {
                Some([0xFF, 0x00, ..]) => {
                    self.at += 2;
                    0xFF
                }
                // Fill bytes before a marker.
                Some([0xFF, 0xFF, ..]) => {
                    self.at += 1;
                    continue;
                }
                None | Some([] | [0xFF, ..]) => return,
                Some(&[byte, ..]) => {
                    self.at += 1;
                    byte
                }
            };
            self.held = self.held << 8 | u64::from(byte);
            self.count += 8;
        }
    }

    /// Goes on behind the restart marker, if one is next.
    pub fn restart(&mut self) {
        self.count = 0;
        let mut at = self.at;
        loop {
            match self.bytes.get(at..) {
                Some([0xFF, 0xD0..=0xD7, ..]) => {
                    self.at = at + 2;
                    return;
                }
                Some([0xFF, 0x00 | 0xFF, ..]) => at += 1,
                None | Some([] | [0xFF, ..]) => {
                    self.ended = true;
                    return;
                }
                // What is left of the bits before it.
                Some(_) => at += 1,
            }
        }
    }

    /// Passes over `n` bits, at most 16, and gives them.
    fn take(&mut self, n: u32) -> Result<u32, Stop> {
        if self.count < n {
            self.fill();
        }
        if self.count < n {
            return self.stop();
        }
        self.count -= n;
        if n > 0 {
            self.told = (self.at, self.count);
        }
        Ok((self.held >> self.count) as u32 & ((1 << n) - 1))
    }

    fn symbol(&mut self, table: Option<&Table>) -> Result<(usize, u32), Stop> {
        if self.count < 16 {
            self.fill();
        }
        // Beyond the end there are ones, as encoders pad.
        let bits = match self.count {
            n @ 16.. => (self.held >> (n - 16)) as u32 & 0xFFFF,
            n => ((self.held << (16 - n)) as u32 | ((1 << (16 - n)) - 1)) & 0xFFFF,
        };
        let found = table.and_then(|table| table.find(bits));
        match found {
            None if self.count >= 16 => Err(Stop::Invalid),
            Some((length, _)) if length > self.count => self.stop(),
            None => self.stop(),
            Some((length, symbol)) => {
                self.count -= length;
                Ok((usize::from(symbol >> 4), u32::from(symbol & 15)))
            }
        }
    }

    fn stop<T>(&mut self) -> Result<T, Stop> {
        (self.count, self.ended) = (0, true);
        Err(Stop::End)
    }

    /// Passes over a block of a sequential scan.
    pub fn block(&mut self, dc: Option<&Table>, ac: Option<&Table>) -> Result<(), Stop> {
        let (_, size) = self.symbol(dc)?;
        self.take(size)?;
        let mut k = 1;
        while k < 64 {
            match self.symbol(ac)? {
                (15, 0) => k += 16,
                (_, 0) => return Ok(()),
                (run, size) => {
                    k += run + 1;
                    self.take(size)?;
                }
            }
        }
        if k > 64 { Err(Stop::Invalid) } else { Ok(()) }
    }

    /// Passes over a block of a progressive scan; `run` counts the blocks without further coefficients (T.81, G.1.2).
    pub fn progressive_block(
        &mut self,
        band: &Band,
        dc: Option<&Table>,
        ac: Option<&Table>,
        nonzero: &mut u64,
        run: &mut u32,
    ) -> Result<(), Stop> {
        match (band.first, band.high) {
            (0, 0) => {
                let (_, size) = self.symbol(dc)?;
                self.take(size).map(drop)
            }
            (0, _) => self.take(1).map(drop),
            (_, 0) => self.first_bits(band, ac, nonzero, run),
            _ => self.further_bits(band, ac, nonzero, run),
        }
    }

    fn first_bits(
        &mut self,
        band: &Band,
        ac: Option<&Table>,
        nonzero: &mut u64,
        run: &mut u32,
    ) -> Result<(), Stop> {
        if *run > 0 {
            *run -= 1;
            return Ok(());
        }
        let mut k = band.first;
        while k <= band.last {
            match self.symbol(ac)? {
                (15, 0) => k += 16,
                (zeros, 0) => {
                    *run = (1 << zeros) - 1 + self.take(zeros as u32)?;
                    return Ok(());
                }
                (zeros, size) => {
                    k += zeros;
                    self.take(size)?;
                    if k > band.last {
                        return Err(Stop::Invalid);
                    }
                    *nonzero |= 1 << k;
                    k += 1;
                }
            }
        }
        Ok(())
    }

    fn further_bits(
        &mut self,
        band: &Band,
        ac: Option<&Table>,
        nonzero: &mut u64,
        run: &mut u32,
    ) -> Result<(), Stop> {
        let mut k = band.first;
        if *run == 0 {
            while k <= band.last {
                let (mut zeros, size) = self.symbol(ac)?;
                if size > 0 {
                    // The sign of the coefficient that becomes 1 or -1.
                    self.take(1)?;
                } else if zeros < 15 {
                    *run = (1 << zeros) + self.take(zeros as u32)?;
                    break;
                }
                // A bit for each coefficient that is not 0 already; those that are 0 are counted.
                while k <= band.last {
                    if *nonzero >> k & 1 == 1 {
                        self.take(1)?;
                    } else if zeros == 0 {
                        break;
                    } else {
                        zeros -= 1;
                    }
                    k += 1;
                }
                if size > 0 && k <= band.last {
                    *nonzero |= 1 << k;
                }
                k += 1;
            }
        }
        if *run > 0 {
            for k in k..=band.last {
                if *nonzero >> k & 1 == 1 {
                    self.take(1)?;
                }
            }
            *run -= 1;
        }
        Ok(())
    }
}
