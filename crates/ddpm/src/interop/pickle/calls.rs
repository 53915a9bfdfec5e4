//! Names that a pickle may use, and what calling them makes.

use super::machine::Machine;
use super::{Id, MAX_COMMANDS, Other, Stop, Storage, Tensor, Trouble, Value};
use crate::interop::dtype::Dtype;

/// Most extents of a tensor, and most arguments of a call that are looked at.
const MAX_DIMS: usize = 16;
const ODD: &str = "one of its calls has other arguments than PyTorch's";

/// The names that a pickle may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::interop) enum Name {
    /// `OrderedDict`, `Counter`, `dict`.
    Dict,
    DefaultDict,
    /// `list`, `tuple`, `set`, `frozenset`, `deque`.
    Items,
    /// What makes plain values without meaning here: `complex`, `bytes`, `slice`.
    Plain,
    Size,
    StorageType(Dtype),
    /// `_rebuild_tensor`, before 2018.
    TensorV1,
    TensorV2,
    Parameter,
    ParameterWithState,
    /// A tensor with attributes, or of a class of its own.
    FromType,
    /// A tensor of a kind that is not read.
    Unread(Trouble),
}

impl Name {
    /// What a module and a name in it stand for.
    pub fn find<'a>(module: &'a str, name: &'a str) -> Value<'a> {
        let builtin = matches!(module, "builtins" | "__builtin__");
        Value::Name(match (module, name) {
            ("collections", "OrderedDict" | "Counter") => Self::Dict,
            ("collections", "defaultdict") => Self::DefaultDict,
            ("collections", "deque") => Self::Items,
            (_, "dict") if builtin => Self::Dict,
            (_, "set" | "frozenset" | "list" | "tuple") if builtin => Self::Items,
            (
                _,
                "complex" | "bytes" | "bytearray" | "slice" | "range" | "xrange" | "int" | "long" | "float"
                | "str" | "unicode" | "bool" | "object" | "Ellipsis" | "NotImplemented",
            ) if builtin => Self::Plain,
            ("_codecs", "encode") | ("torch", "device") => Self::Plain,
            ("torch", "Size") => Self::Size,
            ("torch._utils", "_rebuild_tensor") => Self::TensorV1,
            ("torch._utils", "_rebuild_tensor_v2") => Self::TensorV2,
            ("torch._utils", "_rebuild_parameter") => Self::Parameter,
            ("torch._utils", "_rebuild_parameter_with_state") => Self::ParameterWithState,
            ("torch._tensor" | "torch.tensor", "_rebuild_from_type_v2") => Self::FromType,
            ("torch._utils", rebuild) if rebuild.starts_with("_rebuild_") => Self::Unread(match rebuild {
                "_rebuild_sparse_tensor" | "_rebuild_sparse_csr_tensor" => Trouble::Sparse,
                "_rebuild_nested_tensor" => Trouble::Nested,
                "_rebuild_qtensor" => Trouble::Quantized,
                "_rebuild_tensor_v3" => Trouble::Dtype,
                "_rebuild_meta_tensor_no_storage" => Trouble::Meta,
                "_rebuild_wrapper_subclass" => Trouble::Subclass,
                _ => Trouble::Foreign,
            }),
            ("torch.storage", "_load_from_bytes") => Self::Unread(Trouble::Pickled),
            ("torch" | "torch.cuda" | "torch.storage", storage) if storage.ends_with("Storage") => {
                match Dtype::of_storage(storage) {
                    Some(dtype) => Self::StorageType(dtype),
                    None => return Value::Other(Other::unread_storage(module, storage).into()),
                }
            }
            // As training scripts note them.
            ("torch", dtype) if is_dtype(dtype) => return Value::Nothing,
            _ => return Value::Other(Other::new(module, name).into()),
        })
    }
}

fn is_dtype(name: &str) -> bool {
    let digits = name.trim_start_matches(|c: char| c.is_ascii_lowercase());
    let kind = &name[..name.len() - digits.len()];
    matches!(
        kind,
        "float" | "bfloat" | "int" | "uint" | "complex" | "bool" | "half" | "double" | "long" | "short"
    ) && digits.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

impl<'a> Other<'a> {
    /// A class of storages whose values are not read.
    fn unread_storage(module: &'a str, name: &'a str) -> Self {
        let (trouble, bytes) = match name {
            "ComplexHalfStorage" => (Trouble::Complex, 4),
            "ComplexFloatStorage" => (Trouble::Complex, 8),
            "ComplexDoubleStorage" => (Trouble::Complex, 16),
            "QInt32Storage" => (Trouble::Quantized, 4),
            _ if name.starts_with('Q') => (Trouble::Quantized, 1),
            _ => (Trouble::Dtype, 1),
        };
        Self { trouble: Some(trouble), storage: Some(("", bytes)), ..Self::new(module, name) }
    }

    /// A tensor that is not read for this reason.
    fn tensor(trouble: Trouble) -> Self {
        Self { made: true, trouble: Some(trouble), ..Self::new("torch", "Tensor") }
    }

    /// A tensor that was given a state of its own.
    pub(super) fn foreign_tensor() -> Self {
        Self::tensor(Trouble::Foreign)
    }

    /// Whether calling it acts on the machine, or runs code that a file holds.
    fn is_dangerous(&self) -> bool {
        let top = self.module.split('.').next().unwrap_or_default();
        let leaf = self.name.rsplit('.').next().unwrap_or_default();
        match top {
            // Facts about the machine that programs keep.
            "os" | "posix" | "nt" => {
                !matches!(leaf, "stat_result" | "terminal_size" | "times_result" | "uname_result" | "fspath")
            }
            "builtins" | "__builtin__" => matches!(
                leaf,
                "eval"
                    | "exec"
                    | "execfile"
                    | "compile"
                    | "open"
                    | "file"
                    | "__import__"
                    | "input"
                    | "raw_input"
                    | "breakpoint"
                    | "exit"
                    | "quit"
                    | "setattr"
                    | "delattr"
                    | "globals"
                    | "locals"
                    | "apply"
            ),
            "subprocess" | "commands" | "sys" | "shutil" | "socket" | "importlib" | "imp" | "runpy"
            | "pty" | "ctypes" | "webbrowser" | "timeit" | "code" | "codeop" | "pdb" | "bdb" | "cProfile"
            | "profile" | "pip" => true,
            "pickle" | "_pickle" | "cPickle" | "marshal" | "dill" | "joblib" => leaf.contains("load"),
            "torch" => matches!(
                (self.module, leaf),
                ("torch" | "torch.serialization" | "torch.hub" | "torch.jit" | "torch.package", "load")
            ),
            // A module that another has imported.
            _ => self.name.split('.').any(|part| {
                matches!(
                    part,
                    "os" | "posix" | "sys" | "subprocess" | "builtins" | "__builtins__" | "importlib"
                )
            }),
        }
    }
}

/// What to say of a call that [`Other::is_dangerous`].
fn refusal(other: &Other<'_>) -> Stop {
    Stop::Refused(format!(
        "would call {} when Python loads it: the file runs code of its own, as an attack does. Nothing of it was \
         run, for ddpm never runs code from a file; do not load it in Python unless you know where it is from",
        other.name()
    ))
}

impl<'a> Machine<'a> {
    /// The items of a tuple or a list.
    fn items(&self, id: Id) -> Result<&[Id], Stop> {
        match self.value(id) {
            Value::Tuple(items) | Value::List(items) => Ok(items),
            _ => Err("its pickle has something else where a tuple belongs".into()),
        }
    }

    fn number(&self, id: Id) -> Result<u64, Stop> {
        match self.value(id) {
            Value::Int(v) => {
                u64::try_from(*v).map_err(|_| "one of its sizes, strides or places is negative".into())
            }
            _ => Err("its pickle has something else where a size belongs".into()),
        }
    }

    fn is_flag(&self, id: Id) -> bool {
        matches!(self.value(id), Value::Bool(_) | Value::Int(0 | 1))
    }

    /// Counts items that a call copies.
    fn copies(&mut self, n: usize) -> Result<(), Stop> {
        self.copied += n;
        if self.copied > MAX_COMMANDS { Err("its pickle copies lists without end".into()) } else { Ok(()) }
    }

    fn copy_list(&mut self, id: Id) -> Result<Vec<Id>, Stop> {
        let items = match self.value(id) {
            Value::List(items) | Value::Tuple(items) => items.clone(),
            Value::Dict(entries) => entries.iter().map(|&(key, _)| key).collect(),
            // The text's letters, the numbers of a range.
            Value::Text(_) | Value::Nothing | Value::Other(_) => Vec::new(),
            _ => return Err("its pickle has something else where a list belongs".into()),
        };
        self.copies(items.len())?;
        Ok(items)
    }

    /// The entries of a new dictionary that is made of another, or of pairs.
    fn copy_dict(&mut self, id: Id) -> Result<Vec<(Id, Id)>, Stop> {
        let entries = match self.value(id) {
            Value::Dict(entries) => entries.clone(),
            Value::Other(other) => other.entries.clone(),
            _ => {
                let pairs = self.copy_list(id)?;
                let pair = |&id: &Id| match self.items(id)? {
                    &[key, value] => Ok((key, value)),
                    _ => Err(Stop::from(ODD)),
                };
                return pairs.iter().map(pair).collect();
            }
        };
        self.copies(entries.len())?;
        Ok(entries)
    }

    /// [`call`](Self::call) with the arguments of a tuple.
    pub fn call_with(&mut self, function: Id, arguments: Id) -> Result<(), Stop> {
        let arguments = match self.value(arguments) {
            // Others than a name of the closed list may have any; see `call`.
            Value::Tuple(items) | Value::List(items) => items[..items.len().min(MAX_DIMS + 1)].to_vec(),
            Value::Other(_) => Vec::new(),
            _ => return Err("its pickle has something else where a tuple belongs".into()),
        };
        self.call(function, &arguments)
    }

    /// Pushes what a call of `function` makes, which of an unknown one is an inert mark.
    pub fn call(&mut self, function: Id, arguments: &[Id]) -> Result<(), Stop> {
        for &id in arguments.iter().take(MAX_DIMS) {
            if let Value::Other(other) = self.value(id)
                && !other.made
                && other.is_dangerous()
            {
                return Err(refusal(other));
            }
        }
        let made = match self.value(function) {
            &Value::Name(name) => self.call_known(name, arguments)?,
            Value::Other(other) if self.takes_power(other, arguments) => return Err(refusal(other)),
            Value::Other(other) => Value::Other(self.made_by(other, arguments).into()),
            // A dtype, or bytes of a class of their own.
            Value::Nothing => Value::Nothing,
            _ => return Err("its pickle calls what is no function".into()),
        };
        self.push(made)
    }

    /// Whether the call acts on the machine, or gets hold of what does.
    fn takes_power(&self, function: &Other<'a>, arguments: &[Id]) -> bool {
        const POWERS: [&str; 8] = [
            "system",
            "popen",
            "eval",
            "exec",
            "__import__",
            "__globals__",
            "__builtins__",
            "__subclasses__",
        ];
        let is_getattr = (function.name, function.made) == ("getattr", false);
        let power = |&id: &Id| matches!(self.value(id), Value::Text(text) if POWERS.contains(text));
        (!function.made && function.is_dangerous()) || (is_getattr && arguments.get(1).is_some_and(power))
    }

    /// What an unknown function makes: of those that make any class's objects, something of that class.
    fn made_by(&self, function: &Other<'a>, arguments: &[Id]) -> Other<'a> {
        let of_first = matches!(
            (function.module, function.name),
            ("copyreg" | "copy_reg", "_reconstructor" | "__newobj__" | "__newobj_ex__")
                | ("builtins" | "__builtin__", "getattr")
                | ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct")
        );
        match arguments.first().map(|&id| self.value(id)) {
            Some(Value::Other(class)) if of_first => class.made(),
            _ if matches!(function.module, "numpy.core.multiarray" | "numpy._core.multiarray") => {
                Other { made: true, ..Other::new("numpy", "generic") }
            }
            _ => function.made(),
        }
    }

    fn call_known(&mut self, name: Name, arguments: &[Id]) -> Result<Value<'a>, Stop> {
        if arguments.len() > MAX_DIMS {
            return Err(ODD.into());
        }
        match (name, arguments) {
            (Name::Dict, []) | (Name::DefaultDict, [] | [_]) => Ok(Value::Dict(Vec::new())),
            (Name::Dict, &[pairs]) | (Name::DefaultDict, &[_, pairs]) => {
                Ok(Value::Dict(self.copy_dict(pairs)?))
            }
            (Name::Items, []) => Ok(Value::List(Vec::new())),
            // A deque's second is its greatest length.
            (Name::Items, &[items] | &[items, _]) => Ok(Value::List(self.copy_list(items)?)),
            (Name::Plain, _) => Ok(Value::Nothing),
            (Name::Size, &[items]) => {
                let sizes = self.items(items)?;
                if sizes.len() > MAX_DIMS {
                    return Err(ODD.into());
                }
                Ok(Value::Tuple(sizes.to_vec()))
            }
            (Name::TensorV1, &[storage, offset, shape, stride]) => {
                self.tensor(storage, offset, shape, stride, false)
            }
            (Name::TensorV2, &[storage, offset, shape, stride, requires_grad, hooks, ref more @ ..]) => {
                // Hooks are of gradients, and change no value.
                let is_hooks = matches!(self.value(hooks), Value::Dict(_) | Value::Nothing | Value::Other(_));
                if !self.is_flag(requires_grad) || !is_hooks || more.len() > 1 {
                    return Err(ODD.into());
                }
                match more.first().map_or(Ok(false), |&id| self.negated(id)) {
                    Ok(negative) => self.tensor(storage, offset, shape, stride, negative),
                    Err(trouble) => {
                        // That of its storage says more.
                        let storage = match self.value(storage) {
                            Value::Other(storage) => storage.trouble,
                            _ => None,
                        };
                        Ok(Value::Other(Other::tensor(storage.unwrap_or(trouble)).into()))
                    }
                }
            }
            (Name::Parameter, &[tensor, requires_grad, _])
            | (Name::ParameterWithState, &[tensor, requires_grad, _, _]) => {
                if !self.is_flag(requires_grad) {
                    return Err(ODD.into());
                }
                match self.value(tensor) {
                    Value::Tensor(tensor) => Ok(Value::Tensor(tensor.clone())),
                    Value::Other(other) => {
                        Ok(Value::Other(Other::tensor(other.trouble.unwrap_or(Trouble::Foreign)).into()))
                    }
                    _ => Err(ODD.into()),
                }
            }
            (Name::FromType, &[function, class, arguments, _]) => self.typed(function, class, arguments),
            (Name::Unread(trouble), _) => Ok(Value::Other(Other::tensor(trouble).into())),
            _ => Err(ODD.into()),
        }
    }

    /// The sign of a view by the flags that `_rebuild_tensor_v2` gets last; the error is for others, which may change values in
    /// ways that are not known here.
    fn negated(&self, flags: Id) -> Result<bool, Trouble> {
        let entries = match self.value(flags) {
            Value::Nothing => return Ok(false),
            Value::Dict(entries) => entries,
            _ => return Err(Trouble::Flag),
        };
        let mut negative = false;
        for &(key, value) in entries {
            match (self.value(key), self.value(value)) {
                (Value::Text("neg"), &Value::Bool(flag)) => negative = flag,
                (Value::Text(_), Value::Bool(false)) => {}
                _ => return Err(Trouble::Flag),
            }
        }
        Ok(negative)
    }

    fn tensor(
        &self,
        storage: Id,
        offset: Id,
        shape: Id,
        stride: Id,
        negative: bool,
    ) -> Result<Value<'a>, Stop> {
        let dtype = match self.value(storage) {
            Value::Storage(storage) => storage.dtype,
            Value::Other(other) => {
                let trouble = other.trouble.unwrap_or(Trouble::Foreign);
                return Ok(Value::Other(Other::tensor(trouble).into()));
            }
            _ => return Err("one of its tensors has no storage".into()),
        };
        if negative && matches!(dtype, Dtype::Bool | Dtype::U8) {
            return Ok(Value::Other(Other::tensor(Trouble::Flag).into()));
        }
        let (shape, stride) = (self.items(shape)?, self.items(stride)?);
        if shape.len() != stride.len() || shape.len() > MAX_DIMS {
            return Err("one of its tensors has sizes and strides that do not fit".into());
        }
        let size = |&id: &Id| {
            usize::try_from(self.number(id)?).map_err(|_| Stop::from("one of its tensors is too large"))
        };
        let shape = shape.iter().map(size).collect::<Result<_, _>>()?;
        let stride = stride.iter().map(|&id| self.number(id)).collect::<Result<_, _>>()?;
        let offset = self.number(offset)?;
        Ok(Value::Tensor(Tensor { storage, offset, shape, stride, negative }.into()))
    }

    /// A tensor with attributes, which change no value; of a subclass of tensors only its own code knows what it holds.
    fn typed(&mut self, function: Id, class: Id, arguments: Id) -> Result<Value<'a>, Stop> {
        let plain = match self.value(class) {
            Value::Other(class) => matches!(
                (class.module, class.name),
                ("torch" | "torch._tensor", "Tensor") | ("torch.nn.parameter", "Parameter" | "Buffer")
            ),
            _ => false,
        };
        let &Value::Name(name) = self.value(function) else {
            return Ok(Value::Other(Other::tensor(Trouble::Foreign).into()));
        };
        let of_tensor =
            matches!(name, Name::TensorV1 | Name::TensorV2 | Name::Parameter | Name::ParameterWithState);
        match (name, plain && of_tensor) {
            (Name::Unread(trouble), _) => Ok(Value::Other(Other::tensor(trouble).into())),
            (_, false) => Ok(Value::Other(Other::tensor(Trouble::Subclass).into())),
            (_, true) => {
                let arguments = self.items(arguments)?;
                let arguments = arguments[..arguments.len().min(MAX_DIMS + 1)].to_vec();
                self.call_known(name, &arguments)
            }
        }
    }

    /// Pushes what a persistent id names: ("storage", type, key, location, values), in old files with a view
    /// (key, offset, values) of it or None behind that; or ("module", class, file, source) of whole modules.
    pub fn stored(&mut self, id: Id) -> Result<(), Stop> {
        const ODD: &str = "one of its storages is named in another way than PyTorch's";
        let items = self.items(id)?;
        if let &[word, class, _, _] = items
            && matches!(self.value(word), Value::Text("module"))
        {
            self.push_again(class);
            return Ok(());
        }
        let &[word, kind, key, _, numbers, ref view @ ..] = items else { return Err(ODD.into()) };
        let (&Value::Text("storage"), &Value::Text(key)) = (self.value(word), self.value(key)) else {
            return Err(ODD.into());
        };
        let dtype = match self.value(kind) {
            &Value::Name(Name::StorageType(dtype)) => dtype,
            Value::Other(kind) if kind.storage.is_some() => {
                let storage = kind.storage.map(|(_, bytes)| (key, bytes));
                let made = Value::Other(Other { storage, ..kind.made() }.into());
                return self.push(made);
            }
            _ => return Err(ODD.into()),
        };
        let (mut from, mut numbers) = (0, self.number(numbers)?);
        match *view {
            [] => {}
            [view] if matches!(self.value(view), Value::Nothing) => {}
            [view] => {
                let &[_, offset, size] = self.items(view)? else { return Err(ODD.into()) };
                (from, numbers) = (self.number(offset)?, self.number(size)?);
            }
            _ => return Err(ODD.into()),
        }
        self.push(Value::Storage(Storage { key, dtype, numbers, from }.into()))
    }
}
