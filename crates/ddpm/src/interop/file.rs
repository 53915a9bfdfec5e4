//! Files of tensors: PyTorch's, of both formats, and safetensors. A file is opened, its sets of tensors are listed by
//! names and shapes, and only of the set that is wanted the numbers are read.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{Cursor, Read};

use safetensors::SafeTensors;
use zip::ZipArchive;

use super::dtype::Dtype;
use super::own;
use super::pickle::{MAX_PICKLE, Pickle, Tensor, Trouble, Value};
use super::sets::{At, Found, Listed, MAX_NAME, Set, checked, sets_of};
use crate::train::checkpoint::{NamedTensor, check_extent};

/// What is read of a file may have this many times its length, and [`MIN_MEMORY`]: half floats double, and tensors may
/// share their numbers.
const MAX_RATIO: u64 = 16;
const MIN_MEMORY: u64 = 1 << 20;
/// The beginning of a file of `torch.save`'s older format: a pickle of this number.
const MAGIC: [u8; 12] = [0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

const MISSING: &str = "is damaged: the numbers of a tensor are missing";

/// A file that was recognised, before its list of tensors is read.
pub(super) enum Content<'b> {
    Zip(Archive<'b>),
    Pickle(&'b [u8]),
    Safetensors(&'b [u8]),
}

/// An archive of PyTorch's.
pub(super) struct Archive<'b> {
    zip: RefCell<ZipArchive<Cursor<&'b [u8]>>>,
    /// What the names of its parts begin with.
    folder: String,
    pickle: Vec<u8>,
    /// What `ddpm export` wrote beside the weights.
    own: own::Texts,
    length: u64,
}

impl<'b> Content<'b> {
    /// Recognises the content of a file; the error is the reason alone.
    pub fn open(bytes: &'b [u8]) -> Result<Self, String> {
        if bytes.starts_with(b"PK\x03\x04") {
            return Archive::open(bytes).map(Self::Zip);
        }
        if bytes.get(8) == Some(&b'{') && bytes.len() > 9 && bytes[7] == 0 {
            return Ok(Self::Safetensors(bytes));
        }
        if bytes.get(257..262) == Some(b"ustar") {
            return Err(
                "is of a format that PyTorch left in 2017 (tar); load it there and save it anew".into()
            );
        }
        if bytes.starts_with(b"version https://git-lfs") {
            return Err(
                "is not the file but a pointer to it, as git leaves it without LFS; fetch it: git lfs pull"
                    .into(),
            );
        }
        match bytes.first() {
            Some(0x80 | b'(' | b'c' | b'}' | b']') => Ok(Self::Pickle(bytes)),
            None => Err("is empty".into()),
            _ => Err("is neither a file of PyTorch's (.pth, .pt, .ckpt, .bin) nor a safetensors file".into()),
        }
    }

    /// Reads the list of its tensors; the error is the reason alone.
    pub fn parse(&self) -> Result<TensorFile<'_>, String> {
        match self {
            Self::Zip(archive) => {
                let pickle = Pickle::read(&archive.pickle)?;
                let found = sets_of(&pickle)?;
                Ok(TensorFile { found, own: archive.own.clone(), source: Source::Zip(pickle, archive) })
            }
            Self::Pickle(bytes) => legacy(bytes),
            Self::Safetensors(bytes) => {
                check_extent(bytes)?;
                let damaged = |e| format!("is no whole safetensors file: {e}");
                let (_, header) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
                let own = header.metadata().as_ref().map(own::Texts::of_metadata).unwrap_or_default();
                let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
                let (mut tensors, mut unread) = (Vec::new(), Vec::new());
                for (name, view) in file.iter() {
                    let Some(dtype) = Dtype::of_safetensors(view.dtype()) else {
                        unread.push((name.to_owned(), Trouble::Dtype.reason()));
                        continue;
                    };
                    let (shape, at) = (view.shape().to_vec(), At::Name(name.to_owned()));
                    tensors.push(Listed { name: name.to_owned(), shape, dtype, at, part: 0 });
                }
                let set = Set { place: String::new(), tensors: checked(tensors)?, is_list: false, unread };
                let found = Found { sets: vec![set], ..Found::default() };
                Ok(TensorFile { found, own, source: Source::Safetensors(file, bytes.len() as u64) })
            }
        }
    }
}

impl<'b> Archive<'b> {
    fn open(bytes: &'b [u8]) -> Result<Self, String> {
        let damaged = |e: zip::result::ZipError| format!("is a damaged archive, or cut off: {e}");
        let mut zip = ZipArchive::new(Cursor::new(bytes)).map_err(damaged)?;
        let names: Vec<String> = zip.file_names().flatten().map(|n| n.into_owned()).collect();
        let of = |part: &str| names.iter().find_map(|n| n.strip_suffix(part)).filter(|f| f.len() <= MAX_NAME);
        let Some(folder) = of("data.pkl").filter(|f| f.is_empty() || f.ends_with('/')) else {
            return Err("is a zip archive, but none of PyTorch's: it has no data.pkl".into());
        };
        let folder = folder.to_owned();
        if names.iter().any(|n| n.strip_prefix(folder.as_str()).is_some_and(|n| n.starts_with("code/"))) {
            return Err(
                "is a TorchScript program, which has code in it; save the weights alone, in PyTorch: \
                 torch.save(model.state_dict(), FILE)"
                    .into(),
            );
        }
        let mut part = |name: &str, most: u64| {
            let Some(at) = zip.index_for_name(&format!("{folder}{name}")) else { return Ok(None) };
            unpack(&mut zip, at, most).map(Some)
        };
        if part("byteorder", 16)?.is_some_and(|order| order == b"big") {
            return Err(
                "has its numbers' bytes in the order of a big-endian machine, which is not read".into()
            );
        }
        let pickle = part("data.pkl", MAX_PICKLE as u64)?.unwrap_or_default();
        let mut text =
            |name, most| Ok::<_, String>(part(name, most)?.and_then(|t| String::from_utf8(t).ok()));
        let own = own::Texts {
            settings: text(own::SETTINGS_FILE, own::MAX_SETTINGS)?,
            classes: text(own::CLASSES_FILE, own::MAX_CLASSES)?,
        };
        Ok(Self { zip: RefCell::new(zip), folder, pickle, own, length: bytes.len() as u64 })
    }
}

/// An entry of an archive, of at most `most` bytes; the error is the reason alone.
fn unpack(zip: &mut ZipArchive<Cursor<&[u8]>>, at: usize, most: u64) -> Result<Vec<u8>, String> {
    let damaged = |name: &str, e: &dyn std::fmt::Display| format!("is damaged, or cut off: {name}: {e}");
    let mut entry = zip.by_index(at).map_err(|e| damaged("an entry", &e))?;
    let name = entry.name().map_or_else(|_| "an entry".to_owned(), |n| n.chars().take(80).collect());
    let declared = entry.size();
    if declared > most {
        return Err(format!("{name} would unpack to {declared} bytes; at most {most} are read here"));
    }
    let mut bytes = Vec::new();
    // One more byte than it may have: enough to see that it is longer, and to have its checksum compared.
    entry.by_ref().take(declared + 1).read_to_end(&mut bytes).map_err(|e| damaged(&name, &e))?;
    match bytes.len() as u64 == declared {
        true => Ok(bytes),
        false => Err(damaged(&name, &format!("{} bytes of {declared}", bytes.len()))),
    }
}

/// Where the bytes of a pickle's storages are.
trait Storages {
    /// Those of the storage `key`, at most `left`; the error is the reason alone.
    fn unpack(&self, key: &str, left: u64) -> Result<Vec<u8>, String>;

    /// Length of the file.
    fn length(&self) -> u64;
}

impl Storages for Archive<'_> {
    fn unpack(&self, key: &str, left: u64) -> Result<Vec<u8>, String> {
        let mut zip = self.zip.borrow_mut();
        let at = zip.index_for_name(&format!("{}data/{key}", self.folder));
        unpack(&mut zip, at.ok_or(MISSING)?, left)
    }

    fn length(&self) -> u64 {
        self.length
    }
}

enum Source<'c> {
    Zip(Pickle<'c>, &'c dyn Storages),
    /// With each storage's bytes, and the file's length.
    Legacy(Pickle<'c>, HashMap<&'c str, &'c [u8]>, u64),
    Safetensors(SafeTensors<'c>, u64),
}

/// A file whose list of tensors was read.
pub(super) struct TensorFile<'c> {
    pub found: Found,
    pub own: own::Texts,
    source: Source<'c>,
}

/// A file of the older format: four pickles (a magic number, the format's version, facts about the machine, the content),
/// a list of storages, and these. Without the magic number a single pickle.
fn legacy(bytes: &[u8]) -> Result<TensorFile<'_>, String> {
    let mut at = 0;
    let length = bytes.len() as u64;
    if bytes.get(2..14) != Some(&MAGIC[..]) {
        let pickle = Pickle::read(bytes)?;
        let found = sets_of(&pickle)?;
        if pickle.storages().next().is_some() {
            return Err("is a pickle without the values of its tensors; save it with torch.save".into());
        }
        // Tensors that pickle.dump wrote, and what is no tensor at all, are told by name.
        if found.sets.is_empty() && found.left_out.is_empty() {
            return Err("is a pickle without tensors: it is no file of weights".into());
        }
        return Ok(TensorFile {
            found,
            own: own::Texts::default(),
            source: Source::Legacy(pickle, HashMap::new(), length),
        });
    }
    let mut next = |what| {
        let pickle = Pickle::read(&bytes[at..]).map_err(|reason| format!("{reason} ({what})"))?;
        at += pickle.length;
        Ok::<_, String>(pickle)
    };
    next("its beginning")?;
    let version = next("its version")?;
    if version.int(version.root()) != Some(1001) {
        return Err("is of a version of PyTorch's older format that is not known".into());
    }
    let machine = next("the facts about its machine")?;
    let little = machine.dict(machine.root()).unwrap_or_default().iter().rev();
    let little = little.clone().find(|(key, _)| machine.text(*key) == Some("little_endian"));
    if little.is_some_and(|&(_, value)| matches!(machine.get(value), Value::Bool(false))) {
        return Err("has its numbers' bytes in the order of a big-endian machine, which is not read".into());
    }
    let pickle = next("its content")?;
    let keys = next("its list of storages")?;
    let Value::List(keys_there) = keys.get(keys.root()) else {
        return Err("is damaged: it has no list of storages".into());
    };
    let widths: HashMap<&str, usize> = pickle.storages().collect();
    if pickle.storages().any(|(key, width)| widths[key] != width) {
        return Err("has a storage of two types of numbers at once".into());
    }
    let mut storages = HashMap::new();
    const CUT: &str = "is damaged, or cut off: a storage ends behind the file's end";
    for &key in keys_there {
        let Some((&key, &width)) = keys.text(key).and_then(|key| widths.get_key_value(key)) else {
            return Err("is damaged: its list of storages has one that no tensor uses".into());
        };
        let (count, rest) = bytes[at..].split_first_chunk::<8>().ok_or(CUT)?;
        let size = usize::try_from(u64::from_le_bytes(*count)).ok().and_then(|n| n.checked_mul(width));
        let data = size.and_then(|size| rest.get(..size)).ok_or(CUT)?;
        at += 8 + data.len();
        storages.insert(key, data);
    }
    let found = sets_of(&pickle)?;
    let own = own::Texts::default();
    Ok(TensorFile { found, own, source: Source::Legacy(pickle, storages, length) })
}

/// Where values are that are past all of f32's.
fn overflow(name: &str, value: f64) -> String {
    format!(
        "tensor {name} has the value {value:e}, which f64 can hold and f32, as everything here is computed in, cannot: its \
         largest is {:e}. Look at that tensor in PyTorch; an earlier checkpoint may do",
        f32::MAX
    )
}

impl TensorFile<'_> {
    fn length(&self) -> u64 {
        match &self.source {
            Source::Zip(_, archive) => archive.length(),
            Source::Legacy(_, _, length) | Source::Safetensors(_, length) => *length,
        }
    }

    /// The values of `tensors`, which are of this file, under the names they have there in `tensors`. The error is the reason
    /// alone.
    fn read(&self, tensors: &[&Listed]) -> Result<Vec<NamedTensor>, String> {
        let length = self.length();
        let most = length.saturating_mul(MAX_RATIO).max(MIN_MEMORY);
        let size = |t: &&Listed| t.shape.iter().try_fold(4u64, |n, &s| n.checked_mul(s as u64));
        let all = tensors.iter().try_fold(0u64, |n, t| n.checked_add(size(t)?));
        if all.is_none_or(|all| all > most) {
            return Err(format!(
                "has tensors of more than {most} bytes in a file of {length}: they are expanded views, or it is a bomb; save \
                 copies, in PyTorch with tensor.clone()"
            ));
        }
        let named = |t: &Listed, data| NamedTensor { name: t.name.clone(), shape: t.shape.clone(), data };
        let pickle = match &self.source {
            Source::Safetensors(file, _) => {
                let one = |t: &&Listed| {
                    let At::Name(name) = &t.at else { return Err(MISSING.to_owned()) };
                    let view = file.tensor(name).map_err(|e| e.to_string())?;
                    if let Some(value) = t.dtype.overflow(view.data()) {
                        return Err(overflow(&t.name, value));
                    }
                    Ok(named(t, t.dtype.all(view.data())))
                };
                return tensors.iter().map(one).collect();
            }
            Source::Legacy(pickle, ..) | Source::Zip(pickle, _) => pickle,
        };
        let mut left = most;
        let mut storage = |key: &str| -> Result<Cow<'_, [u8]>, String> {
            match &self.source {
                Source::Legacy(_, storages, _) => Ok(Cow::Borrowed(*storages.get(key).ok_or(MISSING)?)),
                Source::Zip(_, archive) => {
                    let data = archive.unpack(key, left)?;
                    left -= data.len() as u64;
                    Ok(data.into())
                }
                Source::Safetensors(..) => Err(MISSING.into()),
            }
        };
        // Each storage is read once, whoever shares it.
        let mut order = Vec::new();
        for (i, listed) in tensors.iter().enumerate() {
            let At::Value(id) = listed.at else { continue };
            let Value::Tensor(tensor) = pickle.get(id) else { continue };
            let storage = pickle.storage(tensor).ok_or("is damaged: a tensor has no storage")?;
            order.push((storage, i, tensor));
        }
        order.sort_by_key(|&(storage, i, _)| (storage.key, i));
        let mut out: Vec<Option<NamedTensor>> = vec![None; tensors.len()];
        let (mut data, mut key) = (Cow::Borrowed(&[][..]), None);
        for (of, i, tensor) in order {
            if key != Some(of.key) {
                // The one before is given back first.
                drop(data);
                data = if of.numbers == 0 { Cow::Borrowed(&[][..]) } else { storage(of.key)? };
                key = Some(of.key);
            }
            let part = of.part(&data).ok_or("is damaged: a storage has fewer numbers than it says")?;
            let listed = tensors[i];
            let values = gather(tensor, listed.dtype, part).ok_or_else(|| {
                format!("is damaged: tensor {} reaches behind the end of its storage", listed.name)
            })?;
            // Only then is it worth a look at all of its storage.
            if values.iter().any(|v| v.is_infinite())
                && let Some(value) = listed.dtype.overflow(part)
            {
                return Err(overflow(&listed.name, value));
            }
            out[i] = Some(named(listed, values));
        }
        Ok(out.into_iter().flatten().collect())
    }
}

/// The files that weights are in, mostly one.
pub(super) struct Parts<'c> {
    files: Vec<TensorFile<'c>>,
    pub found: Found,
    pub own: own::Texts,
}

impl<'c> Parts<'c> {
    /// All of these files' sets; those of one place are one. The error is the reason alone.
    pub fn new(mut files: Vec<TensorFile<'c>>) -> Result<Self, String> {
        let (mut found, mut own) = (Found::default(), own::Texts::default());
        for (part, file) in files.iter_mut().enumerate() {
            let mut of = std::mem::take(&mut file.found);
            of.sets.iter_mut().flat_map(|s| &mut s.tensors).for_each(|t| t.part = part);
            for set in of.sets {
                match found.sets.iter_mut().find(|s| s.place == set.place && s.is_list == set.is_list) {
                    Some(same) if part > 0 => {
                        same.tensors.extend(set.tensors);
                        same.tensors = checked(std::mem::take(&mut same.tensors))?;
                        same.unread.extend(set.unread);
                    }
                    _ => found.sets.push(set),
                }
            }
            found.left_out.append(&mut of.left_out);
            found.more += of.more;
            found.unread.append(&mut of.unread);
            own = if own.settings.is_none() { std::mem::take(&mut file.own) } else { own };
        }
        Ok(Self { files, found, own })
    }

    /// The values of `tensors`, in their order. The error is the reason alone.
    pub fn read(&self, tensors: &[Listed]) -> Result<Vec<NamedTensor>, String> {
        let mut out: Vec<Option<NamedTensor>> = vec![None; tensors.len()];
        for (part, file) in self.files.iter().enumerate() {
            let of: Vec<usize> = (0..tensors.len()).filter(|&i| tensors[i].part == part).collect();
            let read = file.read(&of.iter().map(|&i| &tensors[i]).collect::<Vec<_>>())?;
            of.into_iter().zip(read).for_each(|(i, tensor)| out[i] = Some(tensor));
        }
        Ok(out.into_iter().flatten().collect())
    }
}

/// The numbers of a tensor, the last extent running fastest, from its storage's; `None` if it reaches outside.
fn gather(tensor: &Tensor, dtype: Dtype, data: &[u8]) -> Option<Vec<f32>> {
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
    let sign = if tensor.negative { -1.0 } else { 1.0 };
    if is_dense {
        let mut values = dtype.all(&data[first * dtype.bytes()..][..count * dtype.bytes()]);
        if tensor.negative {
            values.iter_mut().for_each(|v| *v = -*v);
        }
        return Some(values);
    }
    // An odometer over the indices, the last turning fastest.
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
