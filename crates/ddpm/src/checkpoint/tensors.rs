//! Named tensors and safetensors files.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::Path;

use safetensors::{Dtype, SafeTensors, View};
use serde::Deserialize;

use crate::{Error, Result};
use ddpm_text::nearest;

/// Maximum length of a safetensors header, in bytes; enough for some hundred thousand tensors.
const MAX_HEADER: u64 = 16 << 20;
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

    /// Whether PyTorch stores it as integers.
    pub(crate) fn is_counter(&self) -> bool {
        is_counter(&self.name)
    }
}

/// Whether PyTorch stores the tensor of this name as integers.
pub(crate) fn is_counter(name: &str) -> bool {
    name.ends_with(COUNTER)
}

struct Bytes<'a>(&'a NamedTensor);

impl View for Bytes<'_> {
    fn dtype(&self) -> Dtype {
        self.0.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let data = self.0.data.iter();
        match self.dtype() {
            Dtype::I64 => data.flat_map(|&v| (v as i64).to_le_bytes()).collect::<Vec<_>>().into(),
            _ if cfg!(target_endian = "little") => bytemuck::cast_slice::<f32, u8>(&self.0.data).into(),
            _ => data.flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>().into(),
        }
    }

    fn data_len(&self) -> usize {
        self.0.data.len() * if self.dtype() == Dtype::I64 { 8 } else { 4 }
    }
}

/// Serializes `tensors`, given with prefixes for their names, as a safetensors file; the error is only the reason.
pub(crate) fn to_bytes<'a>(
    tensors: impl IntoIterator<Item = (&'a str, &'a NamedTensor)>,
) -> Result<Vec<u8>, String> {
    let mut seen = HashSet::new();
    let mut views = Vec::new();
    for (prefix, tensor) in tensors {
        let name = format!("{prefix}{}", tensor.name);
        let length = tensor.shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        if length != Some(tensor.data.len()) {
            return Err(format!(
                "{name}: has {} values, but its shape is {:?}",
                tensor.data.len(),
                tensor.shape
            ));
        }
        if !seen.insert(name.clone()) {
            return Err(format!("{name}: occurs twice"));
        }
        views.push((name, Bytes(tensor)));
    }
    // Tells other programs that names and layouts are PyTorch's.
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(about)).map_err(|e| e.to_string())
}

/// [`to_bytes`] with additional metadata entries in the given order; the safetensors crate does not keep the order.
pub(crate) fn to_bytes_with<'a>(
    tensors: impl IntoIterator<Item = (&'a str, &'a NamedTensor)>,
    entries: &[(&str, &str)],
) -> Result<Vec<u8>, String> {
    const PLAIN: &str = r#"{"__metadata__":{"format":"pt""#;
    let mut bytes = to_bytes(tensors)?;
    let length = bytes.first_chunk().map_or(0, |n| u64::from_le_bytes(*n)) as usize;
    let header = bytes.get(8..8 + length).and_then(|h| str::from_utf8(h).ok()).map(str::trim_end);
    let Some(rest) = header.and_then(|h| h.strip_prefix(PLAIN)) else {
        return Err("unexpected header of a serialized safetensors file".into());
    };
    let mut header = PLAIN.to_owned();
    let quoted = |text: &str| serde_json::to_string(text).map_err(|e| e.to_string());
    for (key, text) in entries {
        header += &format!(",{}:{}", quoted(key)?, quoted(text)?);
    }
    header += rest;
    // The data starts at a multiple of eight bytes.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let begin = (header.len() as u64).to_le_bytes().into_iter().chain(header.bytes()).collect::<Vec<_>>();
    bytes.splice(..8 + length, begin);
    Ok(bytes)
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
