//! Named tensors and the safetensors files they are kept in.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::Path;

use safetensors::{Dtype, SafeTensors, View};
use serde::Deserialize;

use crate::train::config::suggest::nearest;
use crate::{Error, Result};

/// Longest header of a safetensors file that is read, in bytes: some hundred thousand tensors.
const MAX_HEADER: u64 = 16 << 20;
/// How many mistakes [`check_fits`] names before it says how many more there are.
const NAMED: usize = 3;

/// An array of f32 with its PyTorch name, in PyTorch's layout (row-major; convolutions `[out, in, height, width]`).
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// The name, as `downs.0.resnet_conv_first.0.0.weight`.
    pub name: String,
    /// The extents; their product is the length of `data`.
    pub shape: Vec<usize>,
    /// The values, the last extent running fastest.
    pub data: Vec<f32>,
}

/// The one kind of tensor that PyTorch keeps as whole numbers: the batches that a batch normalisation has seen.
const COUNTER: &str = ".num_batches_tracked";

impl NamedTensor {
    fn dtype(&self) -> Dtype {
        if self.is_counter() { Dtype::I64 } else { Dtype::F32 }
    }

    /// Whether PyTorch keeps it as whole numbers.
    pub(crate) fn is_counter(&self) -> bool {
        is_counter(&self.name)
    }
}

/// Whether PyTorch keeps the tensor of this name as whole numbers.
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
            _ => data.flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>().into(),
        }
    }

    fn data_len(&self) -> usize {
        self.0.data.len() * if self.dtype() == Dtype::I64 { 8 } else { 4 }
    }
}

/// A safetensors file of `tensors`, whose names get their prefix put before them; the error is the reason alone.
pub(crate) fn to_bytes<'a>(
    tensors: impl IntoIterator<Item = (&'a str, &'a NamedTensor)>,
) -> Result<Vec<u8>, String> {
    to_bytes_about(tensors, &[])
}

/// [`to_bytes`] with entries in the file's metadata.
pub(crate) fn to_bytes_about<'a>(
    tensors: impl IntoIterator<Item = (&'a str, &'a NamedTensor)>,
    entries: &[(&str, &str)],
) -> Result<Vec<u8>, String> {
    let mut seen = HashSet::new();
    let mut views = Vec::new();
    for (prefix, tensor) in tensors {
        let name = format!("{prefix}{}", tensor.name);
        let length = tensor.shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        if length != Some(tensor.data.len()) {
            return Err(format!("{name}: has {} values for the shape {:?}", tensor.data.len(), tensor.shape));
        }
        if !seen.insert(name.clone()) {
            return Err(format!("{name}: is there twice"));
        }
        views.push((name, Bytes(tensor)));
    }
    // The mark by which other programs know PyTorch's names and layouts.
    let mut about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    about.extend(entries.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())));
    safetensors::serialize(views, Some(about)).map_err(|e| e.to_string())
}

/// The tensors of a safetensors file in the order of their names; the error is the reason alone.
pub(super) fn from_bytes(bytes: &[u8]) -> Result<Vec<NamedTensor>, String> {
    check_extent(bytes)?;
    let file =
        SafeTensors::deserialize(bytes).map_err(|e| format!("is not a whole safetensors file: {e}"))?;
    let mut tensors = Vec::new();
    for (name, view) in file.iter() {
        let counter = name.ends_with(COUNTER) && view.dtype() == Dtype::I64;
        if view.dtype() != Dtype::F32 && !counter {
            let reason = "only F32 is read; convert it first, in PyTorch with tensor.float()";
            return Err(format!("tensor {name} is {}: {reason}", view.dtype()));
        }
        let data = if counter {
            let whole = |b: &[u8]| i64::from_le_bytes(b.try_into().expect("chunks of eight")) as f32;
            view.data().chunks_exact(8).map(whole).collect()
        } else {
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        tensors.push(NamedTensor { name: name.to_owned(), shape: view.shape().to_vec(), data });
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

/// Checks that no tensor ends behind the file's end. The safetensors crate adds up the ends it reads without a check
/// against overflow, which a hostile header can bring about.
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
        return Err(format!("is cut short or not a safetensors file: a header of {length} bytes"));
    }
    let (header, data) = rest.split_at(length as usize);
    let entries: HashMap<String, Entry> =
        serde_json::from_slice(header).map_err(|e| format!("is not a safetensors file: its header: {e}"))?;
    for (name, entry) in entries {
        if entry.data_offsets.is_some_and(|(_, end)| end > data.len() as u64) {
            return Err(format!("is cut short: tensor {name} ends behind the file's end"));
        }
    }
    Ok(())
}

/// Checks that the tensors `got` from the file or folder `path` are the `expected` (name, shape), in any order.
///
/// # Errors
/// [`Error::Checkpoint`] with the first few that are missing, left over or of another shape.
pub fn check_fits(expected: &[(String, Vec<usize>)], got: &[NamedTensor], path: &Path) -> Result<()> {
    let there: HashMap<_, _> = got.iter().map(|t| (t.name.as_str(), &t.shape)).collect();
    let wanted: HashSet<_> = expected.iter().map(|(name, _)| name.as_str()).collect();
    let left_over: Vec<_> = got.iter().map(|t| t.name.as_str()).filter(|n| !wanted.contains(n)).collect();
    let (mut missing, mut shapes) = (Vec::new(), Vec::new());
    for (name, shape) in expected {
        match there.get(name.as_str()) {
            // More than are shown need no suggestion.
            None if missing.len() >= NAMED => missing.push(name.clone()),
            None => missing.push(match nearest(name, left_over.iter().copied()) {
                Some(near) => format!("{name} (there is {near})"),
                None => name.clone(),
            }),
            Some(found) if *found != shape => {
                shapes.push(format!("{name} is {found:?}, the network's is {shape:?}"))
            }
            Some(_) => {}
        }
    }
    let left_over: Vec<_> = left_over.into_iter().map(str::to_owned).collect();
    let mut parts = Vec::new();
    for (what, names) in
        [("missing", missing), ("of another shape", shapes), ("not in the network", left_over)]
    {
        if !names.is_empty() {
            let more = names.len().saturating_sub(NAMED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            parts.push(format!("{what}: {}{more}", names[..names.len().min(NAMED)].join(", ")));
        }
    }
    if parts.is_empty() {
        return Ok(());
    }
    let reason = format!(
        "these are another network's weights; {}. Give the network's settings that they were trained with",
        parts.join("; ")
    );
    Err(Error::Checkpoint { path: path.to_owned(), reason })
}
