//! Mutations, determined by the seed and the input's index.

/// SplitMix64 (Steele, Lea, Flood 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64, i: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ i);
        random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A value below `n`; 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    pub fn pick<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.below(of.len())]
    }
}

/// Integers near limits.
const INTEGERS: [u64; 12] = [
    0,
    1,
    127,
    255,
    65_535,
    i32::MAX as u64,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];
/// Pickle opcodes that create or call something.
const OPCODES: &[u8] = b"(.0123FIJKMLNPQRSTUVXabcde}ghijl]oprstu\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96";
/// Meaningful fragments of these formats.
const FRAGMENTS: [&[u8]; 16] = [
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b"18446744073709551616",
    b"[]",
    b"{}",
    b"\"\"",
    b"cos\nsystem\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n)R",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"PK\x03\x04",
    b"\"data_offsets\":[0,18446744073709551615]",
    b"[9223372036854775807,9223372036854775807]",
];

/// Applies one to eight mutations to `bytes`, half of them within `ends` bytes of the start or end, where formats have their
/// headers and indices.
pub fn mutate(bytes: &mut Vec<u8>, other: &[u8], ends: usize, r: &mut Random) {
    for _ in 0..1 + r.below(8) {
        if bytes.is_empty() {
            bytes.extend(other.iter().take(64).chain(b"}"));
            continue;
        }
        let len = bytes.len();
        let at = match r.below(4) {
            0 => r.below(ends.min(len)),
            1 => len - 1 - r.below(ends.min(len)),
            _ => r.below(len),
        };
        match r.below(11) {
            0 => bytes[at] ^= 1 << r.below(8),
            1 => bytes[at] = r.below(256) as u8,
            2 => bytes[at] = OPCODES[r.below(OPCODES.len())],
            3 => {
                let integer = INTEGERS[r.below(INTEGERS.len())].to_le_bytes();
                let n = [1, 2, 4, 8][r.below(4)].min(len - at);
                bytes[at..at + n].copy_from_slice(&integer[..n]);
            }
            4 => bytes.truncate(at),
            5 => {
                let n = r.below(64).min(len - at);
                bytes.drain(at..at + n);
            }
            6 => {
                let fragment = FRAGMENTS[r.below(FRAGMENTS.len())];
                bytes.splice(at..at, fragment.iter().copied());
            }
            7 => {
                let fragment = FRAGMENTS[r.below(FRAGMENTS.len())];
                let end = (at + fragment.len()).min(len);
                bytes.splice(at..end, fragment.iter().copied());
            }
            8 => {
                let n = r.below(256).min(len - at);
                let copy = bytes[at..at + n].to_vec();
                let times = if r.below(64) == 0 { 1 + r.below(2000) } else { 1 };
                let copies = copy.iter().copied().cycle().take(n * times).collect::<Vec<_>>();
                bytes.splice(at..at, copies);
            }
            9 => {
                let from = r.below(other.len());
                let part = &other[from..(from + r.below(512)).min(other.len())];
                bytes.splice(at..at, part.iter().copied());
            }
            _ => {
                // Digits are the numbers of JSON and pickle protocol 0.
                if bytes[at].is_ascii_digit() {
                    bytes[at] = b'0' + r.below(10) as u8;
                } else {
                    bytes.swap(at, len - 1 - at);
                }
            }
        }
    }
}
