//! Named tensors and safetensors files.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::Path;

use safetensors::tensor::TensorInfo;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};
use ddpm_text::nearest;

/// Maximum length of a safetensors header, in bytes; enough for some hundred thousand tensors.
const MAX_HEADER: u64 = 16 << 20;
/// Bytes that are written at once: they stay in the cache between their hash and the disk.
pub(super) const PART: usize = 1 << 20;
/// Number of mismatches of each kind that [`check_fits`] lists by name.
const MAX_NAMED: usize = 3;

/// An array of f32 with its PyTorch name, in PyTorch's layout (row-major; convolutions `[out, in, height, width]`).
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// The name, e.g. `downs.0.resnet_conv_first.0.0.weight`.
    pub name: String,
    /// The dimensions; their product is the length of `data`.
    pub shape: Vec<usize>,
    /// The values, in row-major order.
    pub data: Vec<f32>,
}

/// The only tensors that PyTorch stores as integers: the number of batches seen by a batch normalisation.
const COUNTER: &str = ".num_batches_tracked";

impl NamedTensor {
    fn dtype(&self) -> Dtype {
        if self.is_counter() { Dtype::I64 } else { Dtype::F32 }
    }

    /// Its length in a file.
    fn num_bytes(&self) -> usize {
        self.data.len() * if self.is_counter() { 8 } else { 4 }
    }

    /// Whether PyTorch stores it as integers.
    pub(crate) fn is_counter(&self) -> bool {
        is_counter(&self.name)
    }

    /// Passes the bytes of its data in a file to `sink`, some at a time.
    fn write(&self, sink: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        if self.is_counter() {
            return self.data.iter().try_for_each(|&v| sink(&(v as i64).to_le_bytes()));
        }
        if cfg!(target_endian = "little") {
            return bytemuck::cast_slice::<f32, u8>(&self.data).chunks(PART).try_for_each(sink);
        }
        self.data.iter().try_for_each(|v| sink(&v.to_le_bytes()))
    }
}

/// Whether PyTorch stores the tensor of this name as integers.
pub(crate) fn is_counter(name: &str) -> bool {
    name.ends_with(COUNTER)
}

/// A safetensors file that is written straight from its tensors: the bytes are those of the safetensors crate, but no copy of all data
/// is made.
pub(crate) struct TensorFile<'a> {
    /// The file up to the first tensor's data.
    header: Vec<u8>,
    /// In the order of their data.
    tensors: Vec<&'a NamedTensor>,
}

impl<'a> TensorFile<'a> {
    /// A file of `tensors`, given with prefixes for their names, and of metadata `entries` in this order; the error is only the reason.
    pub fn new(
        tensors: impl IntoIterator<Item = (&'a str, &'a NamedTensor)>,
        entries: &[(&str, &str)],
    ) -> Result<Self, String> {
        let mut named = Vec::new();
        for (prefix, tensor) in tensors {
            let (name, NamedTensor { shape, data, .. }) = (format!("{prefix}{}", tensor.name), tensor);
            let length = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
            if length != Some(data.len()) {
                return Err(format!("{name}: has {} values, but its shape is {shape:?}", data.len()));
            }
            named.push((name, tensor));
        }
        // Wider elements first, so that all are aligned.
        named.sort_by(|(a_name, a), (b_name, b)| b.dtype().cmp(&a.dtype()).then(a_name.cmp(b_name)));
        if let Some(pair) = named.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(format!("{}: occurs twice", pair[0].0));
        }
        // The format tells other programs that names and layouts are PyTorch's.
        let mut metadata = String::new();
        for (key, text) in [("format", "pt")].iter().chain(entries) {
            let comma = if metadata.is_empty() { "" } else { "," };
            metadata += &format!("{comma}{}:{}", json(key)?, json(text)?);
        }
        let mut header = format!(r#"{{"__metadata__":{{{metadata}}}"#);
        let mut offset = 0;
        for (name, tensor) in &named {
            let data_offsets = (offset, offset + tensor.num_bytes());
            offset = data_offsets.1;
            let info = TensorInfo { dtype: tensor.dtype(), shape: tensor.shape.clone(), data_offsets };
            header += &format!(",{}:{}", json(name)?, json(&info)?);
        }
        header.push('}');
        // The data starts at a multiple of eight bytes.
        header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
        let header = (header.len() as u64).to_le_bytes().into_iter().chain(header.into_bytes()).collect();
        Ok(Self { header, tensors: named.into_iter().map(|(_, tensor)| tensor).collect() })
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.header.len() + self.tensors.iter().map(|t| t.num_bytes()).sum::<usize>()
    }

    /// Passes its bytes to `sink`, at most a mebibyte at a time.
    pub fn write(&self, sink: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        self.header.chunks(PART).try_for_each(&mut *sink)?;
        self.tensors.iter().try_for_each(|tensor| tensor.write(sink))
    }

    /// Its bytes in memory.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len());
        // Appending to a vector cannot fail.
        let _ = self.write(&mut |part| {
            bytes.extend_from_slice(part);
            Ok(())
        });
        bytes
    }
}

fn json(value: &(impl Serialize + ?Sized)) -> Result<String, String> {
    serde_json::to_string(value).map_err(|e| e.to_string())
}

/// The tensors of a safetensors file, sorted by name; the error is only the reason.
pub(super) fn from_bytes(bytes: &[u8]) -> Result<Vec<NamedTensor>, String> {
    check_extent(bytes)?;
    let file =
        SafeTensors::deserialize(bytes).map_err(|e| format!("is not a complete safetensors file: {e}"))?;
    let mut tensors = Vec::new();
    for (name, view) in file.iter() {
        let counter = name.ends_with(COUNTER) && view.dtype() == Dtype::I64;
        if view.dtype() != Dtype::F32 && !counter {
            let reason = "only F32 is supported; convert it first, in PyTorch with tensor.float()";
            return Err(format!("tensor {name} is {}: {reason}", view.dtype()));
        }
        let data = if counter {
            let count = |b: &[u8]| i64::from_le_bytes(b.try_into().expect("chunks of eight")) as f32;
            view.data().chunks_exact(8).map(count).collect()
        } else {
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        tensors.push(NamedTensor { name: name.to_owned(), shape: view.shape().to_vec(), data });
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

/// Checks that no tensor extends past the end of the file. The safetensors crate computes tensor ends without overflow
/// checks, which a malicious header can exploit.
pub(crate) fn check_extent(bytes: &[u8]) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Entry {
        data_offsets: Option<(u64, u64)>,
    }
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err("is not a safetensors file: it is shorter than 8 bytes".into());
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER || length > rest.len() as u64 {
        return Err(format!("is truncated or not a safetensors file: its header has {length} bytes"));
    }
    let (header, data) = rest.split_at(length as usize);
    let entries: HashMap<String, Entry> =
        serde_json::from_slice(header).map_err(|e| format!("is not a safetensors file: its header: {e}"))?;
    for (name, entry) in entries {
        if entry.data_offsets.is_some_and(|(_, end)| end > data.len() as u64) {
            return Err(format!("is truncated: tensor {name} extends past the end of the file"));
        }
    }
    Ok(())
}

/// Checks that the tensors `got` from the file or folder `path` are the `expected` (name, shape), in any order.
///
/// # Errors
/// [`Error::Checkpoint`] with the first few that are missing, unexpected, or of another shape.
pub fn check_fits(expected: &[(String, Vec<usize>)], got: &[NamedTensor], path: &Path) -> Result<()> {
    let available: HashMap<_, _> = got.iter().map(|t| (t.name.as_str(), &t.shape)).collect();
    let wanted: HashSet<_> = expected.iter().map(|(name, _)| name.as_str()).collect();
    let unexpected: Vec<_> = got.iter().map(|t| t.name.as_str()).filter(|n| !wanted.contains(n)).collect();
    let (mut missing, mut shapes) = (Vec::new(), Vec::new());
    for (name, shape) in expected {
        match available.get(name.as_str()) {
            // Names that are not shown need no suggestion.
            None if missing.len() >= MAX_NAMED => missing.push(name.clone()),
            None => missing.push(match nearest(name, unexpected.iter().copied()) {
                Some(near) => format!("{name} (there is {near})"),
                None => name.clone(),
            }),
            Some(found) if *found != shape => {
                shapes.push(format!("{name} is {found:?}, but the network's is {shape:?}"))
            }
            Some(_) => {}
        }
    }
    let unexpected: Vec<_> = unexpected.into_iter().map(str::to_owned).collect();
    let mut parts = Vec::new();
    for (what, names) in [("missing", missing), ("wrong shape", shapes), ("not in the network", unexpected)] {
        if !names.is_empty() {
            let more = names.len().saturating_sub(MAX_NAMED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            parts.push(format!("{what}: {}{more}", names[..names.len().min(MAX_NAMED)].join(", ")));
        }
    }
    if parts.is_empty() {
        return Ok(());
    }
    let reason = format!(
        "these are the weights of another network; {}. Use the network settings they were trained with",
        parts.join("; ")
    );
    Err(Error::Checkpoint { path: path.to_owned(), reason })
}
