//! The blocks of a scan: Huffman codes are decoded, coefficient values skipped.

/// Codes of up to this many bits use the lookup table; longer ones are searched by length.
const LOOKUP_BITS: u32 = 9;

/// Why parsing a scan stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The data ended.
    End,
    /// A code that is not in the table, or coefficients beyond the last one.
    Invalid,
}

/// The coefficients of a progressive scan (spectral selection) and their bits (successive approximation).
pub(super) struct CoefficientBand {
    pub first: usize,
    pub last: usize,
    /// 0 in the first scan of these coefficients, else the previous bit position.
    pub high: u8,
    pub low: u8,
}

/// A Huffman table.
pub(super) struct HuffmanTable {
    /// Length and symbol by the leading bits of a code; length 0 for longer codes.
    lookup: Box<[(u8, u8); 1 << LOOKUP_BITS]>,
    /// Per length: the code after the last one of that length, shifted to 16 bits; the index of its first symbol minus its first
    /// code.
    limits: [(u32, i32); 17],
    symbols: Vec<u8>,
}

impl HuffmanTable {
    /// Builds a table from the number of codes of each length from 1 to 16; `None` if there are more codes than fit.
    pub fn new(lengths: &[u8; 16], symbols: &[u8]) -> Option<Self> {
        let (mut code, mut at) = (0u32, 0usize);
        let mut table = Self {
            lookup: Box::new([(0, 0); 1 << LOOKUP_BITS]),
            limits: [(0, 0); 17],
            symbols: symbols.to_vec(),
        };
        for (length, &n) in (1u32..).zip(lengths) {
            let first = code;
            table.limits[length as usize].1 = at as i32 - first as i32;
            for _ in 0..n {
                if code >> length != 0 {
                    return None;
                }
                if length <= LOOKUP_BITS {
                    let start = (code << (LOOKUP_BITS - length)) as usize;
                    table.lookup[start..start + (1 << (LOOKUP_BITS - length))]
                        .fill((length as u8, *symbols.get(at)?));
                }
                (code, at) = (code + 1, at + 1);
            }
            table.limits[length as usize].0 = code << (16 - length);
            code <<= 1;
        }
        Some(table)
    }

    /// Length and symbol of the code that the 16 bits start with.
    fn find(&self, bits: u32) -> Option<(u32, u8)> {
        let (length, symbol) = self.lookup[(bits >> (16 - LOOKUP_BITS)) as usize];
        if length > 0 {
            return Some((length.into(), symbol));
        }
        let length = (LOOKUP_BITS + 1..=16).find(|&length| bits < self.limits[length as usize].0)?;
        let at = (bits >> (16 - length)) as i32 + self.limits[length as usize].1;
        Some((length, *self.symbols.get(usize::try_from(at).ok()?)?))
    }
}

/// The bits of a scan up to the next marker, without byte stuffing.
pub(super) struct BitReader<'a> {
    bytes: &'a [u8],
    at: usize,
    held: u64,
    count: u32,
    /// Whether more bits or restart markers were requested than present.
    ended: bool,
    /// `at` and `count` after the last bits that were not part of a Huffman code.
    last_payload: (usize, u32),
}

impl<'a> BitReader<'a> {
    pub fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at, held: 0, count: 0, ended: false, last_payload: (at, 0) }
    }

    /// The position of the next unread byte; never past the marker that ends the bits.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Whether everything requested was present, and the rest of the last byte has the fill bits that encoders write.
    pub fn is_exact(&self) -> bool {
        let rest = self.count % 8;
        let filler = (1u64 << rest) - 1;
        !self.ended && (rest == 0 || [0, filler].contains(&(self.held >> (self.count - rest) & filler)))
    }

    /// The position after the last byte of which a bit was consumed.
    pub fn end(&self) -> usize {
        self.byte_position(self.at, self.count)
    }

    /// The position after which there are only codes without further bits: those of empty blocks.
    pub fn blank(&self) -> usize {
        self.byte_position(self.last_payload.0, self.last_payload.1)
    }

    /// The position after the last byte of which a bit was consumed, when `count` of the bits before `at` were buffered.
    fn byte_position(&self, mut at: usize, count: u32) -> usize {
        // Steps back over the buffered bytes as they are stored in the file.
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

    /// Skips to after the restart marker, if one is next.
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
                // Unused bits before the marker.
                Some(_) => at += 1,
            }
        }
    }

    /// Consumes and returns `n` bits, at most 16.
    fn read_bits(&mut self, n: u32) -> Result<u32, Stop> {
        if self.count < n {
            self.fill();
        }
        if self.count < n {
            return self.stop();
        }
        self.count -= n;
        if n > 0 {
            self.last_payload = (self.at, self.count);
        }
        Ok((self.held >> self.count) as u32 & ((1 << n) - 1))
    }

    fn symbol(&mut self, table: Option<&HuffmanTable>) -> Result<(usize, u32), Stop> {
        if self.count < 16 {
            self.fill();
        }
        // Past the end, pads with ones, as encoders do.
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

    /// Skips a block of a sequential scan.
    pub fn block(&mut self, dc: Option<&HuffmanTable>, ac: Option<&HuffmanTable>) -> Result<(), Stop> {
        let (_, size) = self.symbol(dc)?;
        self.read_bits(size)?;
        let mut k = 1;
        while k < 64 {
            match self.symbol(ac)? {
                (15, 0) => k += 16,
                (_, 0) => return Ok(()),
                (run, size) => {
                    k += run + 1;
                    self.read_bits(size)?;
                }
            }
        }
        if k > 64 { Err(Stop::Invalid) } else { Ok(()) }
    }

    /// Skips a block of a progressive scan; `run` counts the remaining blocks of an end-of-band run (T.81, G.1.2).
    pub fn progressive_block(
        &mut self,
        band: &CoefficientBand,
        dc: Option<&HuffmanTable>,
        ac: Option<&HuffmanTable>,
        nonzero: &mut u64,
        run: &mut u32,
    ) -> Result<(), Stop> {
        match (band.first, band.high) {
            (0, 0) => {
                let (_, size) = self.symbol(dc)?;
                self.read_bits(size).map(drop)
            }
            (0, _) => self.read_bits(1).map(drop),
            (_, 0) => self.first_ac(band, ac, nonzero, run),
            _ => self.refine_ac(band, ac, nonzero, run),
        }
    }

    /// The first scan of AC coefficients.
    fn first_ac(
        &mut self,
        band: &CoefficientBand,
        ac: Option<&HuffmanTable>,
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
                    *run = (1 << zeros) - 1 + self.read_bits(zeros as u32)?;
                    return Ok(());
                }
                (zeros, size) => {
                    k += zeros;
                    self.read_bits(size)?;
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

    /// A refinement scan of AC coefficients.
    fn refine_ac(
        &mut self,
        band: &CoefficientBand,
        ac: Option<&HuffmanTable>,
        nonzero: &mut u64,
        run: &mut u32,
    ) -> Result<(), Stop> {
        let mut k = band.first;
        if *run == 0 {
            while k <= band.last {
                let (mut zeros, size) = self.symbol(ac)?;
                if size > 0 {
                    // The sign of a coefficient that becomes 1 or -1.
                    self.read_bits(1)?;
                } else if zeros < 15 {
                    *run = (1 << zeros) + self.read_bits(zeros as u32)?;
                    break;
                }
                // One correction bit for each coefficient that is already nonzero; zeros are counted.
                while k <= band.last {
                    if *nonzero >> k & 1 == 1 {
                        self.read_bits(1)?;
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
                    self.read_bits(1)?;
                }
            }
            *run -= 1;
        }
        Ok(())
    }
}
