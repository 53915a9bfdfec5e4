//! Reads PyTorch's pickles without executing anything.
//!
//! A pickle is a program for a stack machine that can import and call any Python function. This interpreter resolves only
//! an allow-list of globals: plain containers, storage types and the functions that rebuild a tensor from a storage. Any
//! other global, and any object it would create, becomes an inert placeholder ([`Foreign`]), which matters only if a
//! tensor depends on it. A call that could affect the host, such as `os.system`, aborts parsing with an error.
//!
//! All values live in one arena and refer to each other by index, so self-references and deep nesting need no special
//! handling. Each opcode creates at most one value.
//!
//! | file | contents |
//! |---|---|
//! | `opcode` | opcode constants |
//! | `machine` | the interpreter loop |
//! | `globals` | the allow-list, and the results of calls |

mod globals;
mod machine;
pub(super) mod opcode;

use super::dtype::Dtype;
use globals::Global;

/// Maximum pickle length in bytes. A large network needs a few hundred kilobytes; NumPy arrays are stored inline and can
/// make it longer.
pub(super) const MAX_PICKLE: usize = 64 << 20;
/// Maximum number of opcodes in a pickle; each costs a few dozen bytes of memory.
const MAX_OPS: usize = 4 << 20;

/// Index of a value in a [`Pickle`]'s arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ValueId(u32);

/// An unpickled value.
#[derive(Debug)]
pub(super) enum Value<'a> {
    /// `None`, or a value this reader ignores: floats, bytes, integers wider than 64 bits, `torch.device`.
    Opaque,
    Bool(bool),
    Int(i64),
    Text(&'a str),
    /// A list or a set.
    List(Vec<ValueId>),
    Tuple(Vec<ValueId>),
    /// Key-value pairs in insertion order; the last of several equal keys wins.
    Dict(Vec<(ValueId, ValueId)>),
    /// A global on the allow-list.
    Global(Global),
    Storage(Box<Storage<'a>>),
    Tensor(Box<Tensor>),
    Foreign(Box<Foreign<'a>>),
}

/// A storage: the flat array that tensors are views of.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Storage<'a> {
    /// Its key in the file.
    pub key: &'a str,
    pub dtype: Dtype,
    /// Number of elements.
    pub len: u64,
    /// First element within the parent storage, for a view of one (legacy files only); 0 otherwise.
    pub start: u64,
}

impl Storage<'_> {
    /// This storage's bytes within those of its parent; `None` if out of range.
    pub fn slice_of<'d>(&self, parent: &'d [u8]) -> Option<&'d [u8]> {
        let bytes = |n: u64| usize::try_from(n).ok()?.checked_mul(self.dtype.bytes());
        parent.get(bytes(self.start)?..)?.get(..bytes(self.len)?)
    }
}

/// A tensor: a view of a storage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor {
    /// Index of its storage.
    pub storage: ValueId,
    pub offset: u64,
    pub shape: Vec<usize>,
    pub stride: Vec<u64>,
    /// Whether its elements are the negated elements of the storage (`torch.Tensor.is_neg`).
    pub negate: bool,
}

/// Placeholder for a global outside the allow-list, or for an object it would create.
#[derive(Clone, Debug)]
pub(super) struct Foreign<'a> {
    module: &'a str,
    name: &'a str,
    /// Whether this is an object created by a call rather than the global itself.
    pub made: bool,
    /// Items set on it, as on a dict subclass.
    pub entries: Vec<(ValueId, ValueId)>,
    /// Its attributes (the argument of `BUILD`).
    pub state: Option<ValueId>,
    /// For a tensor or a storage: why it is not supported.
    pub unsupported: Option<Unsupported>,
    /// For a storage: its key in the file and its element size in bytes.
    pub storage: Option<(&'a str, u8)>,
}

impl<'a> Foreign<'a> {
    fn new(module: &'a str, name: &'a str) -> Self {
        let (entries, state) = (Vec::new(), None);
        Self { module, name, made: false, entries, state, unsupported: None, storage: None }
    }

    /// An object created by calling this global.
    fn made(&self) -> Self {
        Self {
            made: true,
            unsupported: self.unsupported,
            storage: self.storage,
            ..Self::new(self.module, self.name)
        }
    }

    /// Qualified name of its class or function, for messages.
    pub fn name(&self) -> String {
        format!("{}.{}", self.module, self.name).chars().filter(|c| !c.is_control()).take(200).collect()
    }
}

/// Why a tensor is not supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unsupported {
    Sparse,
    Nested,
    Quantized,
    Complex,
    /// A dtype without a storage class, such as float8.
    Dtype,
    Meta,
    Subclass,
    /// Written by `pickle.dump`.
    Pickled,
    /// A view flag that may change values.
    Flag,
    /// Created by code outside the file.
    Foreign,
}

impl Unsupported {
    /// Short description of the tensor.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Sparse => "a sparse tensor",
            Self::Nested => "a nested tensor",
            Self::Quantized => "a quantized tensor",
            Self::Complex => "a complex tensor",
            Self::Dtype => "a tensor of an unsupported dtype",
            Self::Meta => "a tensor on the meta device",
            Self::Subclass => "a tensor subclass",
            Self::Pickled | Self::Flag | Self::Foreign => "an unsupported tensor",
        }
    }

    /// What the tensor is and how to convert it; completes "tensor NAME is ...".
    pub fn reason(self) -> &'static str {
        match self {
            Self::Sparse => "sparse, which is not supported; convert it in PyTorch with tensor.to_dense()",
            Self::Nested => {
                "a nested tensor, which is not supported; convert it in PyTorch with tensor.to_padded_tensor(0)"
            }
            Self::Quantized => {
                "quantized, which is not supported; convert it in PyTorch with tensor.dequantize()"
            }
            Self::Complex => {
                "complex, which is not supported; keep its real part in PyTorch with tensor.real"
            }
            Self::Dtype => {
                "of an unsupported dtype (such as float8 or uint16); convert it in PyTorch with tensor.float()"
            }
            Self::Meta => {
                "on the meta device, where tensors have no values; save the network after loading its weights"
            }
            Self::Subclass => {
                "a torch.Tensor subclass, whose values only its own code can interpret; convert it in PyTorch with \
                 tensor.as_subclass(torch.Tensor)"
            }
            Self::Pickled => {
                "stored in the format of pickle.dump, which is not supported; convert the file in PyTorch with \
                 torch.save(pickle.load(open(FILE, \"rb\")), NEW_FILE)"
            }
            Self::Flag => {
                "a view with a flag that may change its values (such as conj), which is not supported; save a copy in \
                 PyTorch with tensor.resolve_conj().resolve_neg().clone()"
            }
            Self::Foreign => {
                "created by code outside the file, which ddpm never runs; save a plain copy in PyTorch with \
                 tensor.detach().cpu().clone()"
            }
        }
    }
}

/// A parsed pickle.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    root: ValueId,
    /// Number of input bytes consumed.
    pub length: usize,
}

impl<'a> Pickle<'a> {
    /// Parses the pickle at the start of `bytes`; the error is the reason without a path.
    pub fn read(bytes: &'a [u8]) -> Result<Self, String> {
        let fits = bytes.len() <= MAX_PICKLE;
        let mut machine = machine::Machine::new(&bytes[..bytes.len().min(MAX_PICKLE)]);
        match machine.run() {
            Ok(root) => Ok(Self { values: machine.values, root, length: machine.pos }),
            Err(_) if !fits && machine.pos >= MAX_PICKLE => {
                Err(format!("has a pickle of more than {} MiB", MAX_PICKLE >> 20))
            }
            Err(PickleError::Rejected(reason)) => Err(reason),
            Err(PickleError::Corrupt(what)) => Err(format!("is damaged, or not a PyTorch file: {what}")),
        }
    }

    /// The top-level value.
    pub fn root(&self) -> ValueId {
        self.root
    }

    /// The value at an index.
    pub fn get(&self, id: ValueId) -> &Value<'a> {
        &self.values[id.0 as usize]
    }

    pub fn text(&self, id: ValueId) -> Option<&'a str> {
        match self.get(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn int(&self, id: ValueId) -> Option<i64> {
        match self.get(id) {
            Value::Int(v) => Some(*v),
            _ => None,
        }
    }

    /// The items of a dict.
    pub fn dict(&self, id: ValueId) -> Option<&[(ValueId, ValueId)]> {
        match self.get(id) {
            Value::Dict(entries) => Some(entries),
            _ => None,
        }
    }

    /// The value of a key in a dict; the last one if the key repeats.
    pub fn entry(&self, id: ValueId, key: &str) -> Option<ValueId> {
        let entries = self.dict(id)?;
        entries.iter().rev().find(|(k, _)| self.text(*k) == Some(key)).map(|&(_, value)| value)
    }

    /// Key and element size in bytes of every storage, once per reference.
    pub fn storages(&self) -> impl Iterator<Item = (&'a str, usize)> {
        self.values.iter().filter_map(|value| match value {
            Value::Storage(storage) => Some((storage.key, storage.dtype.bytes())),
            Value::Foreign(foreign) if foreign.made => {
                foreign.storage.map(|(key, bytes)| (key, bytes.into()))
            }
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

/// Why parsing failed.
enum PickleError {
    /// The pickle uses something unsupported or unsafe; the complete reason.
    Rejected(String),
    /// The bytes are malformed.
    Corrupt(&'static str),
}

impl From<&'static str> for PickleError {
    fn from(what: &'static str) -> Self {
        Self::Corrupt(what)
    }
}
