//! Element types of other programs' tensors.

use half::{bf16, f16};
use safetensors::Dtype as SafeDtype;

/// An element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dtype {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Dtype {
    pub const ALL: [Self; 10] = [
        Self::F64,
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::I64,
        Self::I32,
        Self::I16,
        Self::I8,
        Self::U8,
        Self::Bool,
    ];

    /// The dtype of a PyTorch storage class.
    pub fn of_storage(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|d| d.storage() == name)
    }

    /// Its PyTorch storage class.
    pub fn storage(self) -> &'static str {
        match self {
            Self::F64 => "DoubleStorage",
            Self::F32 => "FloatStorage",
            Self::F16 => "HalfStorage",
            Self::Bf16 => "BFloat16Storage",
            Self::I64 => "LongStorage",
            Self::I32 => "IntStorage",
            Self::I16 => "ShortStorage",
            Self::I8 => "CharStorage",
            Self::U8 => "ByteStorage",
            Self::Bool => "BoolStorage",
        }
    }

    /// The dtype of a safetensors dtype.
    pub fn of_safetensors(dtype: SafeDtype) -> Option<Self> {
        Some(match dtype {
            SafeDtype::F64 => Self::F64,
            SafeDtype::F32 => Self::F32,
            SafeDtype::F16 => Self::F16,
            SafeDtype::BF16 => Self::Bf16,
            SafeDtype::I64 => Self::I64,
            SafeDtype::I32 => Self::I32,
            SafeDtype::I16 => Self::I16,
            SafeDtype::I8 => Self::I8,
            SafeDtype::U8 => Self::U8,
            SafeDtype::BOOL => Self::Bool,
            _ => return None,
        })
    }

    /// Its name, as in Rust.
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::I64 => "i64",
            Self::I32 => "i32",
            Self::I16 => "i16",
            Self::I8 => "i8",
            Self::U8 => "u8",
            Self::Bool => "bool",
        }
    }

    /// Element size in bytes.
    pub fn bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// Element `i` of little-endian `data` as f32, rounded to nearest.
    #[inline]
    pub fn get(self, data: &[u8], i: usize) -> f32 {
        fn at<const N: usize>(data: &[u8], i: usize) -> [u8; N] {
            *data[i * N..].first_chunk().expect("the index is in range")
        }
        match self {
            Self::F64 => f64::from_le_bytes(at(data, i)) as f32,
            Self::F32 => f32::from_le_bytes(at(data, i)),
            Self::F16 => f16::from_le_bytes(at(data, i)).to_f32(),
            Self::Bf16 => bf16::from_le_bytes(at(data, i)).to_f32(),
            Self::I64 => i64::from_le_bytes(at(data, i)) as f32,
            Self::I32 => i32::from_le_bytes(at(data, i)) as f32,
            Self::I16 => i16::from_le_bytes(at(data, i)).into(),
            Self::I8 => i8::from_le_bytes(at(data, i)).into(),
            Self::U8 => data[i].into(),
            Self::Bool => u8::from(data[i] != 0).into(),
        }
    }

    /// The first finite f64 in `data` that overflows f32; `None` for other dtypes.
    pub fn overflow(self, data: &[u8]) -> Option<f64> {
        if self != Self::F64 {
            return None;
        }
        let (all, _) = data.as_chunks::<8>();
        all.iter().map(|&b| f64::from_le_bytes(b)).find(|v| v.is_finite() && (*v as f32).is_infinite())
    }

    /// All elements of `data` as f32.
    pub fn all(self, data: &[u8]) -> Vec<f32> {
        (0..data.len() / self.bytes()).map(|i| self.get(data, i)).collect()
    }
}
