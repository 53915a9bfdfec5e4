//! Tensor files: PyTorch's, in both formats, and safetensors. Opening a file lists its state dicts by names and
//! shapes; values are read only for the chosen one.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{Cursor, Read};

use safetensors::SafeTensors;
use zip::ZipArchive;

use super::dtype::Dtype;
use super::embedded;
use super::pickle::{MAX_PICKLE, Pickle, Tensor, Unsupported, Value, opcode as op};
use super::state_dicts::{
    FileContents, MAX_NAME, StateDict, TensorEntry, TensorRef, checked, find_state_dicts,
};
use crate::checkpoint::{NamedTensor, check_extent};

/// Tensors may take up to this many times the file's length in memory, and at least [`MIN_MEMORY`]: converting f16 to f32
/// doubles them, and tensors may share a storage.
const MAX_RATIO: u64 = 16;
const MIN_MEMORY: u64 = 1 << 20;
/// Magic number at the start of `torch.save`'s legacy format: a `LONG1` opcode, its length and a 10-byte integer.
const MAGIC: [u8; 12] = [op::LONG1, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

const MISSING: &str = "is damaged: the values of a tensor are missing";

/// The content of a file of known format, not yet parsed.
pub(super) enum Content<'b> {
    Zip(Archive<'b>),
    Pickle(&'b [u8]),
    Safetensors(&'b [u8]),
}

/// A PyTorch zip archive.
pub(super) struct Archive<'b> {
    zip: RefCell<ZipArchive<Cursor<&'b [u8]>>>,
    /// Prefix of its member names.
    folder: String,
    pickle: Vec<u8>,
    /// What `ddpm export` stored with the weights.
    embedded: embedded::EmbeddedTexts,
    length: u64,
}

impl<'b> Content<'b> {
    /// Detects the format of a file; the error is the reason without a path.
    pub fn open(bytes: &'b [u8]) -> Result<Self, String> {
        if bytes.starts_with(b"PK\x03\x04") {
            return Archive::open(bytes).map(Self::Zip);
        }
        if bytes.get(8) == Some(&b'{') && bytes.len() > 9 && bytes[7] == 0 {
            return Ok(Self::Safetensors(bytes));
        }
        if bytes.get(257..262) == Some(b"ustar") {
            return Err(
                "is in the tar format that PyTorch dropped in 2017; load it there and save it again".into()
            );
        }
        if bytes.starts_with(b"version https://git-lfs") {
            return Err("is a Git LFS pointer, not the file itself; fetch the file with git lfs pull".into());
        }
        match bytes.first() {
            Some(&(op::PROTO | op::MARK | op::GLOBAL | op::EMPTY_DICT | op::EMPTY_LIST)) => {
                Ok(Self::Pickle(bytes))
            }
            None => Err("is empty".into()),
            _ => Err("is neither a PyTorch file (.pth, .pt, .ckpt, .bin) nor a safetensors file".into()),
        }
    }

    /// Lists its tensors; the error is the reason without a path.
    pub fn parse(&self) -> Result<TensorFile<'_>, String> {
        match self {
            Self::Zip(archive) => {
                let pickle = Pickle::read(&archive.pickle)?;
                let found = find_state_dicts(&pickle)?;
                Ok(TensorFile {
                    found,
                    embedded: archive.embedded.clone(),
                    source: TensorSource::Zip(pickle, archive),
                })
            }
            Self::Pickle(bytes) => parse_legacy(bytes),
            Self::Safetensors(bytes) => {
                check_extent(bytes)?;
                let damaged = |e| format!("is damaged, or not a safetensors file: {e}");
                let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
                let embedded =
                    header.metadata().as_ref().map(embedded::EmbeddedTexts::of_metadata).unwrap_or_default();
                let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
                let (mut tensors, mut unsupported) = (Vec::new(), Vec::new());
                for (name, view) in file.iter() {
                    let Some(dtype) = Dtype::of_safetensors(view.dtype()) else {
                        unsupported.push((name.to_owned(), Unsupported::Dtype.reason()));
                        continue;
                    };
                    let (shape, at) = (view.shape().to_vec(), TensorRef::Name(name.to_owned()));
                    tensors.push(TensorEntry { name: name.to_owned(), shape, dtype, at, part: 0 });
                }
                let set = StateDict {
                    key_path: String::new(),
                    tensors: checked(tensors)?,
                    is_list: false,
                    unsupported,
                };
                let found = FileContents { sets: vec![set], ..FileContents::default() };
                Ok(TensorFile {
                    found,
                    embedded,
                    source: TensorSource::Safetensors(file, bytes.len() as u64),
                })
            }
        }
    }
}

impl<'b> Archive<'b> {
    fn open(bytes: &'b [u8]) -> Result<Self, String> {
        let damaged = |e: zip::result::ZipError| format!("is a damaged or truncated archive: {e}");
        let mut zip = ZipArchive::new(Cursor::new(bytes)).map_err(damaged)?;
        let names: Vec<String> = zip.file_names().flatten().map(|n| n.into_owned()).collect();
        let of = |part: &str| names.iter().find_map(|n| n.strip_suffix(part)).filter(|f| f.len() <= MAX_NAME);
        let Some(folder) = of("data.pkl").filter(|f| f.is_empty() || f.ends_with('/')) else {
            return Err("is a zip archive, but not a PyTorch file: it has no data.pkl".into());
        };
        let folder = folder.to_owned();
        if names.iter().any(|n| n.strip_prefix(folder.as_str()).is_some_and(|n| n.starts_with("code/"))) {
            return Err("is a TorchScript program, which contains code; save only the weights in PyTorch: \
                 torch.save(model.state_dict(), FILE)"
                .into());
        }
        let mut part = |name: &str, most: u64| {
            let Some(at) = zip.index_for_name(&format!("{folder}{name}")) else { return Ok(None) };
            unpack(&mut zip, at, most).map(Some)
        };
        if part("byteorder", 16)?.is_some_and(|order| order == b"big") {
            return Err("has big-endian values, which are not supported".into());
        }
        let pickle = part("data.pkl", MAX_PICKLE as u64)?.unwrap_or_default();
        let mut text =
            |name, most| Ok::<_, String>(part(name, most)?.and_then(|t| String::from_utf8(t).ok()));
        let embedded = embedded::EmbeddedTexts {
            settings: text(embedded::SETTINGS_FILE, embedded::MAX_SETTINGS)?,
            classes: text(embedded::CLASSES_FILE, embedded::MAX_CLASSES)?,
        };
        Ok(Self { zip: RefCell::new(zip), folder, pickle, embedded, length: bytes.len() as u64 })
    }
}

/// Unpacks an archive member of at most `most` bytes; the error is the reason without a path.
fn unpack(zip: &mut ZipArchive<Cursor<&[u8]>>, at: usize, most: u64) -> Result<Vec<u8>, String> {
    let damaged = |name: &str, e: &dyn std::fmt::Display| format!("is damaged or truncated: {name}: {e}");
    let mut entry = zip.by_index(at).map_err(|e| damaged("an entry", &e))?;
    let name = entry.name().map_or_else(|_| "an entry".to_owned(), |n| n.chars().take(80).collect());
    let declared = entry.size();
    if declared > most {
        return Err(format!("{name} would unpack to {declared} bytes; the limit is {most}"));
    }
    let mut bytes = Vec::new();
    // One byte beyond the declared size: enough to detect a longer entry, and to trigger the checksum comparison.
    entry.by_ref().take(declared + 1).read_to_end(&mut bytes).map_err(|e| damaged(&name, &e))?;
    if bytes.len() as u64 == declared {
        Ok(bytes)
    } else {
        Err(damaged(&name, &format!("{} bytes of {declared}", bytes.len())))
    }
}

/// Reads the storages of a pickle.
trait StorageReader {
    /// The bytes of the storage `key`, at most `left`; the error is the reason without a path.
    fn unpack(&self, key: &str, left: u64) -> Result<Vec<u8>, String>;

    /// Length of the file.
    fn length(&self) -> u64;
}

impl StorageReader for Archive<'_> {
    fn unpack(&self, key: &str, left: u64) -> Result<Vec<u8>, String> {
        let mut zip = self.zip.borrow_mut();
        let at = zip.index_for_name(&format!("{}data/{key}", self.folder));
        unpack(&mut zip, at.ok_or(MISSING)?, left)
    }

    fn length(&self) -> u64 {
        self.length
    }
}

enum TensorSource<'c> {
    Zip(Pickle<'c>, &'c dyn StorageReader),
    /// With the bytes of each storage, and the file's length.
    Legacy(Pickle<'c>, HashMap<&'c str, &'c [u8]>, u64),
    Safetensors(SafeTensors<'c>, u64),
}

/// A parsed file.
pub(super) struct TensorFile<'c> {
    pub found: FileContents,
    pub embedded: embedded::EmbeddedTexts,
    source: TensorSource<'c>,
}

/// Parses a legacy file: four pickles (magic number, format version, machine info, content), a pickled list of storage keys,
/// and the storages. Without the magic number, it is a single pickle.
fn parse_legacy(bytes: &[u8]) -> Result<TensorFile<'_>, String> {
    let mut at = 0;
    let length = bytes.len() as u64;
    if bytes.get(2..14) != Some(&MAGIC[..]) {
        let pickle = Pickle::read(bytes)?;
        let found = find_state_dicts(&pickle)?;
        if pickle.storages().next().is_some() {
            return Err("is a pickle without its tensors' values; save it with torch.save".into());
        }
        // Tensors from pickle.dump and objects that are not tensors are reported by name later.
        if found.sets.is_empty() && found.skipped.is_empty() {
            return Err("is a pickle without tensors, so not a weights file".into());
        }
        return Ok(TensorFile {
            found,
            embedded: embedded::EmbeddedTexts::default(),
            source: TensorSource::Legacy(pickle, HashMap::new(), length),
        });
    }
    let mut next = |what| {
        let pickle = Pickle::read(&bytes[at..]).map_err(|reason| format!("{reason} ({what})"))?;
        at += pickle.length;
        Ok::<_, String>(pickle)
    };
    next("magic number")?;
    let version = next("format version")?;
    if version.int(version.root()) != Some(1001) {
        return Err("has an unknown version of PyTorch's legacy format".into());
    }
    let machine = next("machine info")?;
    let little = machine.dict(machine.root()).unwrap_or_default().iter().rev();
    let little = little.clone().find(|(key, _)| machine.text(*key) == Some("little_endian"));
    if little.is_some_and(|&(_, value)| matches!(machine.get(value), Value::Bool(false))) {
        return Err("has big-endian values, which are not supported".into());
    }
    let pickle = next("content")?;
    let keys = next("list of storages")?;
    let Value::List(keys_there) = keys.get(keys.root()) else {
        return Err("is damaged: it has no list of storages".into());
    };
    let widths: HashMap<&str, usize> = pickle.storages().collect();
    if pickle.storages().any(|(key, width)| widths[key] != width) {
        return Err("has a storage with two different dtypes".into());
    }
    let mut storages = HashMap::new();
    const CUT: &str = "is damaged or truncated: a storage extends past the end of the file";
    for &key in keys_there {
        let Some((&key, &width)) = keys.text(key).and_then(|key| widths.get_key_value(key)) else {
            return Err("is damaged: it lists a storage that no tensor uses".into());
        };
        let (count, rest) = bytes[at..].split_first_chunk::<8>().ok_or(CUT)?;
        let size = usize::try_from(u64::from_le_bytes(*count)).ok().and_then(|n| n.checked_mul(width));
        let data = size.and_then(|size| rest.get(..size)).ok_or(CUT)?;
        at += 8 + data.len();
        storages.insert(key, data);
    }
    let found = find_state_dicts(&pickle)?;
    let embedded = embedded::EmbeddedTexts::default();
    Ok(TensorFile { found, embedded, source: TensorSource::Legacy(pickle, storages, length) })
}

/// The error for a value that overflows f32.
fn overflow(name: &str, value: f64) -> String {
    format!(
        "tensor {name} has the value {value:e}, which overflows f32, the type that ddpm computes in (largest value {:e}); \
         inspect that tensor in PyTorch, or try an earlier checkpoint",
        f32::MAX
    )
}

impl TensorFile<'_> {
    fn length(&self) -> u64 {
        match &self.source {
            TensorSource::Zip(_, archive) => archive.length(),
            TensorSource::Legacy(_, _, length) | TensorSource::Safetensors(_, length) => *length,
        }
    }

    /// Reads `tensors`, all from this file, under their names in `tensors`. The error is the reason without a path.
    fn read(&self, tensors: &[&TensorEntry]) -> Result<Vec<NamedTensor>, String> {
        let length = self.length();
        let most = length.saturating_mul(MAX_RATIO).max(MIN_MEMORY);
        let size = |t: &&TensorEntry| t.shape.iter().try_fold(4u64, |n, &s| n.checked_mul(s as u64));
        let all = tensors.iter().try_fold(0u64, |n, t| n.checked_add(size(t)?));
        if all.is_none_or(|all| all > most) {
            return Err(format!(
                "has more than {most} bytes of tensors in a file of {length} bytes: they are expanded views, or the file is a \
                 decompression bomb; save copies in PyTorch with tensor.clone()"
            ));
        }
        let named =
            |t: &TensorEntry, data| NamedTensor { name: t.name.clone(), shape: t.shape.clone(), data };
        let pickle = match &self.source {
            TensorSource::Safetensors(file, _) => {
                let one = |t: &&TensorEntry| {
                    let TensorRef::Name(name) = &t.at else { return Err(MISSING.to_owned()) };
                    let view = file.tensor(name).map_err(|e| e.to_string())?;
                    if let Some(value) = t.dtype.overflow(view.data()) {
                        return Err(overflow(&t.name, value));
                    }
                    Ok(named(t, t.dtype.all(view.data())))
                };
                return tensors.iter().map(one).collect();
            }
            TensorSource::Legacy(pickle, ..) | TensorSource::Zip(pickle, _) => pickle,
        };
        let mut left = most;
        let mut storage = |key: &str| -> Result<Cow<'_, [u8]>, String> {
            match &self.source {
                TensorSource::Legacy(_, storages, _) => Ok(Cow::Borrowed(*storages.get(key).ok_or(MISSING)?)),
                TensorSource::Zip(_, archive) => {
                    let data = archive.unpack(key, left)?;
                    left -= data.len() as u64;
                    Ok(data.into())
                }
                TensorSource::Safetensors(..) => Err(MISSING.into()),
            }
        };
        // Each storage is read once, even if tensors share it.
        let mut order = Vec::new();
        for (i, entry) in tensors.iter().enumerate() {
            let TensorRef::Value(id) = entry.at else { continue };
            let Value::Tensor(tensor) = pickle.get(id) else { continue };
            let storage = pickle.storage(tensor).ok_or("is damaged: a tensor has no storage")?;
            order.push((storage, i, tensor));
        }
        order.sort_by_key(|&(storage, i, _)| (storage.key, i));
        let mut out: Vec<Option<NamedTensor>> = vec![None; tensors.len()];
        let (mut data, mut key) = (Cow::Borrowed(&[][..]), None);
        for (of, i, tensor) in order {
            if key != Some(of.key) {
                // Free the previous storage first.
                drop(data);
                data = if of.len == 0 { Cow::Borrowed(&[][..]) } else { storage(of.key)? };
                key = Some(of.key);
            }
            let part = of.slice_of(&data).ok_or("is damaged: a storage has fewer elements than declared")?;
            let entry = tensors[i];
            let values = read_strided(tensor, entry.dtype, part).ok_or_else(|| {
                format!("is damaged: tensor {} extends past the end of its storage", entry.name)
            })?;
            // Scan the storage for overflow only if an infinity shows up.
            if values.iter().any(|v| v.is_infinite())
                && let Some(value) = entry.dtype.overflow(part)
            {
                return Err(overflow(&entry.name, value));
            }
            out[i] = Some(named(entry, values));
        }
        Ok(out.into_iter().flatten().collect())
    }
}

/// The files that hold a set of weights, usually one.
pub(super) struct Parts<'c> {
    files: Vec<TensorFile<'c>>,
    pub found: FileContents,
    pub embedded: embedded::EmbeddedTexts,
}

impl<'c> Parts<'c> {
    /// Merges the contents of the files, joining state dicts with equal key paths. The error is the reason without a path.
    pub fn new(mut files: Vec<TensorFile<'c>>) -> Result<Self, String> {
        let (mut found, mut embedded) = (FileContents::default(), embedded::EmbeddedTexts::default());
        for (part, file) in files.iter_mut().enumerate() {
            let mut of = std::mem::take(&mut file.found);
            of.sets.iter_mut().flat_map(|s| &mut s.tensors).for_each(|t| t.part = part);
            for set in of.sets {
                match found.sets.iter_mut().find(|s| s.key_path == set.key_path && s.is_list == set.is_list) {
                    Some(same) if part > 0 => {
                        same.tensors.extend(set.tensors);
                        same.tensors = checked(std::mem::take(&mut same.tensors))?;
                        same.unsupported.extend(set.unsupported);
                    }
                    _ => found.sets.push(set),
                }
            }
            found.skipped.append(&mut of.skipped);
            found.more += of.more;
            found.unsupported.append(&mut of.unsupported);
            embedded =
                if embedded.settings.is_none() { std::mem::take(&mut file.embedded) } else { embedded };
        }
        Ok(Self { files, found, embedded })
    }

    /// Reads `tensors`, in order. The error is the reason without a path.
    pub fn read(&self, tensors: &[TensorEntry]) -> Result<Vec<NamedTensor>, String> {
        let mut out: Vec<Option<NamedTensor>> = vec![None; tensors.len()];
        for (part, file) in self.files.iter().enumerate() {
            let of: Vec<usize> = (0..tensors.len()).filter(|&i| tensors[i].part == part).collect();
            let read = file.read(&of.iter().map(|&i| &tensors[i]).collect::<Vec<_>>())?;
            of.into_iter().zip(read).for_each(|(i, tensor)| out[i] = Some(tensor));
        }
        Ok(out.into_iter().flatten().collect())
    }
}

/// The elements of a strided tensor in row-major order; `None` if it extends past its storage.
fn read_strided(tensor: &Tensor, dtype: Dtype, data: &[u8]) -> Option<Vec<f32>> {
    let count = tensor.shape.iter().try_fold(1usize, |n, &s| n.checked_mul(s))?;
    if count == 0 {
        return Some(Vec::new());
    }
    let last =
        tensor.shape.iter().zip(&tensor.stride).try_fold(tensor.offset, |at, (&n, &stride)| {
            at.checked_add((n as u64 - 1).checked_mul(stride)?)
        })?;
    if last >= (data.len() / dtype.bytes()) as u64 {
        return None;
    }
    let mut dense = 1;
    let is_dense = tensor.shape.iter().zip(&tensor.stride).rev().all(|(&n, &stride)| {
        let fits = n == 1 || stride == dense;
        dense *= n as u64;
        fits
    });
    let first = tensor.offset as usize;
    let sign = if tensor.negate { -1.0 } else { 1.0 };
    if is_dense {
        let mut values = dtype.all(&data[first * dtype.bytes()..][..count * dtype.bytes()]);
        if tensor.negate {
            values.iter_mut().for_each(|v| *v = -*v);
        }
        return Some(values);
    }
    // Iterate over the indices like an odometer, the last one fastest.
    let (mut index, mut at) = (vec![0usize; tensor.shape.len()], first);
    let mut out = Vec::with_capacity(count);
    for _ in 0..count {
        out.push(sign * dtype.get(data, at));
        for ((i, &n), &stride) in index.iter_mut().zip(&tensor.shape).zip(&tensor.stride).rev() {
            *i += 1;
            at += stride as usize;
            if *i < n {
                break;
            }
            at -= n * stride as usize;
            *i = 0;
        }
    }
    Some(out)
}
