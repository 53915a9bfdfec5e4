//! Pickles, as PyTorch writes them, read without running anything.
//!
//! A pickle is a program for a stack machine, and may name any function of Python to be called. Here the machine knows a
//! closed list of names: plain containers, the types of storages, the functions that make a tensor of a storage. Every other
//! name, and whatever would be made by it, is an inert mark ([`Other`]): it stands where the value would, and matters only
//! where a tensor depends on it. Calls that act on the machine, as `os.system`, end the reading with an error.
//!
//! All values live in one list and refer to each other by their places in it: a value that holds itself, or is held ten
//! thousand deep, is nothing special, and each command makes at most one value.
//!
//! | file | what |
//! |---|---|
//! | `machine` | the commands |
//! | `calls` | the names, and what calling them makes |

mod calls;
mod machine;

use super::dtype::Dtype;
use calls::Name;

/// Longest pickle that is read, in bytes. Those of large networks have some hundred thousand; arrays of numpy, which stand in
/// the pickle itself, make longer ones.
pub(super) const MAX_PICKLE: usize = 64 << 20;
/// Most commands of a pickle, each of which takes some dozen bytes of memory.
const MAX_COMMANDS: usize = 4 << 20;

/// The place of a value in a [`Pickle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Id(u32);

/// What a value is.
#[derive(Debug)]
pub(super) enum Value<'a> {
    /// `None`, and what has no meaning here: fractions, bytes, integers of more than 64 bits, `torch.device`.
    Nothing,
    Bool(bool),
    Int(i64),
    Text(&'a str),
    /// A list or a set.
    List(Vec<Id>),
    Tuple(Vec<Id>),
    /// Keys and values in their order; of equal keys the last counts.
    Dict(Vec<(Id, Id)>),
    /// A name of the closed list.
    Name(Name),
    Storage(Box<Storage<'a>>),
    Tensor(Box<Tensor>),
    Other(Box<Other<'a>>),
}

/// Values that tensors are made of.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Storage<'a> {
    /// Its name in the file.
    pub key: &'a str,
    pub dtype: Dtype,
    /// How many values it has.
    pub numbers: u64,
    /// Where in the storage it begins, in values, if it is a part of one (old files only).
    pub from: u64,
}

impl Storage<'_> {
    /// Its values' bytes in those of the whole it is a part of; `None` if there are fewer.
    pub fn part<'d>(&self, whole: &'d [u8]) -> Option<&'d [u8]> {
        let bytes = |n: u64| usize::try_from(n).ok()?.checked_mul(self.dtype.bytes());
        whole.get(bytes(self.from)?..)?.get(..bytes(self.numbers)?)
    }
}

/// A tensor: a view of a storage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor {
    /// The place of its storage.
    pub storage: Id,
    pub offset: u64,
    pub shape: Vec<usize>,
    pub stride: Vec<u64>,
    /// Whether its values are those of the storage with the other sign (`torch.Tensor.is_neg`).
    pub negative: bool,
}

/// A name outside the closed list, or what would be made by it.
#[derive(Clone, Debug)]
pub(super) struct Other<'a> {
    module: &'a str,
    name: &'a str,
    /// Whether it is something made, and not the name alone.
    pub made: bool,
    /// Entries that were set on it, as on a class of dictionaries.
    pub entries: Vec<(Id, Id)>,
    /// Its attributes.
    pub state: Option<Id>,
    /// If it is a tensor, or a storage: why it is not read.
    pub trouble: Option<Trouble>,
    /// If it is a storage: its name in the file, and the bytes of a value.
    pub storage: Option<(&'a str, u8)>,
}

impl<'a> Other<'a> {
    fn new(module: &'a str, name: &'a str) -> Self {
        let (entries, state) = (Vec::new(), None);
        Self { module, name, made: false, entries, state, trouble: None, storage: None }
    }

    /// Something that the name makes.
    fn made(&self) -> Self {
        Self { made: true, trouble: self.trouble, storage: self.storage, ..Self::new(self.module, self.name) }
    }

    /// Its class or function, for messages.
    pub fn name(&self) -> String {
        format!("{}.{}", self.module, self.name).chars().filter(|c| !c.is_control()).take(200).collect()
    }
}

/// Why a tensor is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    Sparse,
    Nested,
    Quantized,
    Complex,
    /// Of a dtype that has no class of storages, as float8.
    Dtype,
    Meta,
    Subclass,
    /// Written by `pickle.dump`.
    Pickled,
    /// A flag of its view that may change values.
    Flag,
    /// Made of something that only code outside the file could make.
    Foreign,
}

impl Trouble {
    /// What the tensor is, in a word or two.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Sparse => "a sparse tensor",
            Self::Nested => "a nested tensor",
            Self::Quantized => "a quantized tensor",
            Self::Complex => "a complex tensor",
            Self::Dtype => "a tensor of a dtype that is not read",
            Self::Meta => "a tensor on the device meta",
            Self::Subclass => "a tensor of a subclass",
            Self::Pickled | Self::Flag | Self::Foreign => "a tensor that is not read",
        }
    }

    /// What the tensor is, and what to do, as the end of "tensor NAME is".
    pub fn reason(self) -> &'static str {
        match self {
            Self::Sparse => "sparse, which is not read; make it dense, in PyTorch with tensor.to_dense()",
            Self::Nested => {
                "a nested tensor, which is not read; in PyTorch, tensor.to_padded_tensor(0) makes a plain one"
            }
            Self::Quantized => "quantized, which is not read; in PyTorch, tensor.dequantize() makes it f32",
            Self::Complex => "complex, which is not read; keep its real part, in PyTorch with tensor.real",
            Self::Dtype => {
                "of a dtype that is not read (as float8, uint16); convert it, in PyTorch with tensor.float()"
            }
            Self::Meta => {
                "on the device meta, where tensors have no values; save the network after its weights are loaded"
            }
            Self::Subclass => {
                "of a subclass of torch.Tensor, whose values only its own code knows; in PyTorch, \
                 tensor.as_subclass(torch.Tensor) makes a plain one"
            }
            Self::Pickled => {
                "without its values, which pickle.dump writes in a form that is not read; in PyTorch: \
                 torch.save(pickle.load(open(FILE, \"rb\")), NEW_FILE)"
            }
            Self::Flag => {
                "a view with a flag that may change its values (as conj), which is not read; save a copy, in PyTorch with \
                 tensor.resolve_conj().resolve_neg().clone()"
            }
            Self::Foreign => {
                "made by code outside the file, which ddpm never runs; save a plain copy, in PyTorch with \
                 tensor.detach().cpu().clone()"
            }
        }
    }
}

/// A pickle that was read.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    root: Id,
    /// Bytes of the input that it took.
    pub length: usize,
}

impl<'a> Pickle<'a> {
    /// Reads the pickle that `bytes` begin with; the error is the reason alone.
    pub fn read(bytes: &'a [u8]) -> Result<Self, String> {
        let all = bytes.len() <= MAX_PICKLE;
        let mut machine = machine::Machine::new(&bytes[..bytes.len().min(MAX_PICKLE)]);
        match machine.run() {
            Ok(root) => Ok(Self { values: machine.values, root, length: machine.at }),
            Err(_) if !all && machine.at >= MAX_PICKLE => {
                Err(format!("has a pickle of more than {} MiB", MAX_PICKLE >> 20))
            }
            Err(Stop::Refused(reason)) => Err(reason),
            Err(Stop::Damaged(what)) => Err(format!("is damaged, or no file of PyTorch's: {what}")),
        }
    }

    /// What the pickle is of.
    pub fn root(&self) -> Id {
        self.root
    }

    /// The value at a place.
    pub fn get(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize]
    }

    pub fn text(&self, id: Id) -> Option<&'a str> {
        match self.get(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn int(&self, id: Id) -> Option<i64> {
        match self.get(id) {
            Value::Int(v) => Some(*v),
            _ => None,
        }
    }

    /// The entries of a dictionary.
    pub fn dict(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.get(id) {
            Value::Dict(entries) => Some(entries),
            _ => None,
        }
    }

    /// The last value under a key of a dictionary.
    pub fn entry(&self, id: Id, key: &str) -> Option<Id> {
        let entries = self.dict(id)?;
        entries.iter().rev().find(|(k, _)| self.text(*k) == Some(key)).map(|&(_, value)| value)
    }

    /// The name and the bytes of a value of all storages, as often as they are named.
    pub fn storages(&self) -> impl Iterator<Item = (&'a str, usize)> {
        self.values.iter().filter_map(|value| match value {
            Value::Storage(storage) => Some((storage.key, storage.dtype.bytes())),
            Value::Other(other) if other.made => other.storage.map(|(key, bytes)| (key, bytes.into())),
            _ => None,
        })
    }

    /// The storage of a tensor.
    pub fn storage(&self, tensor: &Tensor) -> Option<&Storage<'a>> {
        match self.get(tensor.storage) {
            Value::Storage(storage) => Some(storage),
            _ => None,
        }
    }
}

/// Why the machine stopped early.
enum Stop {
    /// It was asked for something that it does not do; the whole reason.
    Refused(String),
    /// What is wrong with the bytes.
    Damaged(&'static str),
}

impl From<&'static str> for Stop {
    fn from(what: &'static str) -> Self {
        Self::Damaged(what)
    }
}
