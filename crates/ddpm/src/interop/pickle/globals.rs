//! The allow-list of globals, and the results of calling them.

use super::machine::Machine;
use super::{Foreign, MAX_OPS, PickleError, Storage, Tensor, Unsupported, Value, ValueId};
use crate::interop::dtype::Dtype;

/// Maximum number of tensor dimensions, and of call arguments that are examined.
const MAX_DIMS: usize = 16;
const BAD_ARGS: &str = "a call has arguments that PyTorch never writes";

/// A global on the allow-list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::interop) enum Global {
    /// `OrderedDict`, `Counter`, `dict`.
    Dict,
    DefaultDict,
    /// `list`, `tuple`, `set`, `frozenset`, `deque`.
    Items,
    /// Constructors of plain values that are ignored: `complex`, `bytes`, `slice`.
    Plain,
    Size,
    StorageType(Dtype),
    /// `_rebuild_tensor`, used before 2018.
    RebuildTensor,
    RebuildTensorV2,
    RebuildParameter,
    RebuildParameterWithState,
    /// `_rebuild_from_type_v2`: a tensor with attributes, or a tensor subclass.
    RebuildFromType,
    /// Rebuilds a tensor of an unsupported kind.
    Unsupported(Unsupported),
}

impl Global {
    /// Resolves `module.name`.
    pub fn resolve<'a>(module: &'a str, name: &'a str) -> Value<'a> {
        let builtin = matches!(module, "builtins" | "__builtin__");
        Value::Global(match (module, name) {
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
            ("torch._utils", "_rebuild_tensor") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensorV2,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch._utils", "_rebuild_parameter_with_state") => Self::RebuildParameterWithState,
            ("torch._tensor" | "torch.tensor", "_rebuild_from_type_v2") => Self::RebuildFromType,
            ("torch._utils", rebuild) if rebuild.starts_with("_rebuild_") => {
                Self::Unsupported(match rebuild {
                    "_rebuild_sparse_tensor" | "_rebuild_sparse_csr_tensor" => Unsupported::Sparse,
                    "_rebuild_nested_tensor" => Unsupported::Nested,
                    "_rebuild_qtensor" => Unsupported::Quantized,
                    "_rebuild_tensor_v3" => Unsupported::Dtype,
                    "_rebuild_meta_tensor_no_storage" => Unsupported::Meta,
                    "_rebuild_wrapper_subclass" => Unsupported::Subclass,
                    _ => Unsupported::Foreign,
                })
            }
            ("torch.storage", "_load_from_bytes") => Self::Unsupported(Unsupported::Pickled),
            ("torch" | "torch.cuda" | "torch.storage", storage) if storage.ends_with("Storage") => {
                match Dtype::of_storage(storage) {
                    Some(dtype) => Self::StorageType(dtype),
                    None => return Value::Foreign(Foreign::unsupported_storage(module, storage).into()),
                }
            }
            // Dtypes, which training scripts save among their settings.
            ("torch", dtype) if is_dtype(dtype) => return Value::Opaque,
            _ => return Value::Foreign(Foreign::new(module, name).into()),
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

impl<'a> Foreign<'a> {
    /// A storage class whose elements are not supported.
    fn unsupported_storage(module: &'a str, name: &'a str) -> Self {
        let (unsupported, bytes) = match name {
            "ComplexHalfStorage" => (Unsupported::Complex, 4),
            "ComplexFloatStorage" => (Unsupported::Complex, 8),
            "ComplexDoubleStorage" => (Unsupported::Complex, 16),
            "QInt32Storage" => (Unsupported::Quantized, 4),
            _ if name.starts_with('Q') => (Unsupported::Quantized, 1),
            _ => (Unsupported::Dtype, 1),
        };
        Self { unsupported: Some(unsupported), storage: Some(("", bytes)), ..Self::new(module, name) }
    }

    /// An unsupported tensor.
    fn tensor(unsupported: Unsupported) -> Self {
        Self { made: true, unsupported: Some(unsupported), ..Self::new("torch", "Tensor") }
    }

    /// A tensor with attributes set on it directly.
    pub(super) fn tensor_with_state() -> Self {
        Self::tensor(Unsupported::Foreign)
    }

    /// Whether calling it could affect the host or run code from a file.
    fn is_dangerous(&self) -> bool {
        let top = self.module.split('.').next().unwrap_or_default();
        let leaf = self.name.rsplit('.').next().unwrap_or_default();
        match top {
            // Plain records about the host that programs save are harmless.
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
            // A dangerous module reached as an attribute of another.
            _ => self.name.split('.').any(|part| {
                matches!(
                    part,
                    "os" | "posix" | "sys" | "subprocess" | "builtins" | "__builtins__" | "importlib"
                )
            }),
        }
    }
}

/// The error for a call that [`Foreign::is_dangerous`].
fn refusal(foreign: &Foreign<'_>) -> PickleError {
    PickleError::Rejected(format!(
        "would call {} when loaded in Python: the file executes code, as a malicious file would. ddpm never executes code \
         from a file, and ran none of it; do not load the file in Python unless you trust its source",
        foreign.name()
    ))
}

impl<'a> Machine<'a> {
    /// The items of a tuple or list.
    fn items(&self, id: ValueId) -> Result<&[ValueId], PickleError> {
        match self.value(id) {
            Value::Tuple(items) | Value::List(items) => Ok(items),
            _ => Err("the pickle has a value that is not a tuple where one is expected".into()),
        }
    }

    fn number(&self, id: ValueId) -> Result<u64, PickleError> {
        match self.value(id) {
            Value::Int(v) => u64::try_from(*v).map_err(|_| "a size, stride or offset is negative".into()),
            _ => Err("the pickle has a value that is not an integer where a size is expected".into()),
        }
    }

    fn is_bool(&self, id: ValueId) -> bool {
        matches!(self.value(id), Value::Bool(_) | Value::Int(0 | 1))
    }

    /// Adds to the count of items copied by calls, and checks its limit.
    fn count_copied(&mut self, n: usize) -> Result<(), PickleError> {
        self.copied += n;
        if self.copied > MAX_OPS { Err("the pickle copies lists too often".into()) } else { Ok(()) }
    }

    fn copy_list(&mut self, id: ValueId) -> Result<Vec<ValueId>, PickleError> {
        let items = match self.value(id) {
            Value::List(items) | Value::Tuple(items) => items.clone(),
            Value::Dict(entries) => entries.iter().map(|&(key, _)| key).collect(),
            // Iterating a string or a range: the items are not needed.
            Value::Text(_) | Value::Opaque | Value::Foreign(_) => Vec::new(),
            _ => return Err("the pickle has a value that is not a list where one is expected".into()),
        };
        self.count_copied(items.len())?;
        Ok(items)
    }

    /// The items of a dict constructed from another dict or from pairs.
    fn copy_dict(&mut self, id: ValueId) -> Result<Vec<(ValueId, ValueId)>, PickleError> {
        let entries = match self.value(id) {
            Value::Dict(entries) => entries.clone(),
            Value::Foreign(foreign) => foreign.entries.clone(),
            _ => {
                let pairs = self.copy_list(id)?;
                let pair = |&id: &ValueId| match self.items(id)? {
                    &[key, value] => Ok((key, value)),
                    _ => Err(PickleError::from(BAD_ARGS)),
                };
                return pairs.iter().map(pair).collect();
            }
        };
        self.count_copied(entries.len())?;
        Ok(entries)
    }

    /// [`call`](Self::call) with the arguments in a tuple.
    pub fn call_with(&mut self, function: ValueId, arguments: ValueId) -> Result<(), PickleError> {
        let arguments = match self.value(arguments) {
            // Foreign callables accept any number of arguments; see `call`.
            Value::Tuple(items) | Value::List(items) => items[..items.len().min(MAX_DIMS + 1)].to_vec(),
            Value::Foreign(_) => Vec::new(),
            _ => return Err("the pickle has a value that is not a tuple where one is expected".into()),
        };
        self.call(function, &arguments)
    }

    /// Pushes the result of calling `function`, a placeholder if the function is foreign.
    pub fn call(&mut self, function: ValueId, arguments: &[ValueId]) -> Result<(), PickleError> {
        for &id in arguments.iter().take(MAX_DIMS) {
            if let Value::Foreign(foreign) = self.value(id)
                && !foreign.made
                && foreign.is_dangerous()
            {
                return Err(refusal(foreign));
            }
        }
        let made = match self.value(function) {
            &Value::Global(name) => self.call_global(name, arguments)?,
            Value::Foreign(foreign) if self.grants_capability(foreign, arguments) => {
                return Err(refusal(foreign));
            }
            Value::Foreign(foreign) => Value::Foreign(self.instance_from(foreign, arguments).into()),
            // A dtype, or a bytes subclass.
            Value::Opaque => Value::Opaque,
            _ => return Err("the pickle calls a value that is not callable".into()),
        };
        self.push(made)
    }

    /// Whether the call affects the host, or obtains something that can.
    fn grants_capability(&self, function: &Foreign<'a>, arguments: &[ValueId]) -> bool {
        const CAPABILITIES: [&str; 8] = [
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
        let is_capability =
            |&id: &ValueId| matches!(self.value(id), Value::Text(text) if CAPABILITIES.contains(text));
        (!function.made && function.is_dangerous())
            || (is_getattr && arguments.get(1).is_some_and(is_capability))
    }

    /// The result of a foreign call; generic constructors return an instance of the class they are given.
    fn instance_from(&self, function: &Foreign<'a>, arguments: &[ValueId]) -> Foreign<'a> {
        let of_first = matches!(
            (function.module, function.name),
            ("copyreg" | "copy_reg", "_reconstructor" | "__newobj__" | "__newobj_ex__")
                | ("builtins" | "__builtin__", "getattr")
                | ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct")
        );
        match arguments.first().map(|&id| self.value(id)) {
            Some(Value::Foreign(class)) if of_first => class.made(),
            _ if matches!(function.module, "numpy.core.multiarray" | "numpy._core.multiarray") => {
                Foreign { made: true, ..Foreign::new("numpy", "generic") }
            }
            _ => function.made(),
        }
    }

    fn call_global(&mut self, name: Global, arguments: &[ValueId]) -> Result<Value<'a>, PickleError> {
        if arguments.len() > MAX_DIMS {
            return Err(BAD_ARGS.into());
        }
        match (name, arguments) {
            (Global::Dict, []) | (Global::DefaultDict, [] | [_]) => Ok(Value::Dict(Vec::new())),
            (Global::Dict, &[pairs]) | (Global::DefaultDict, &[_, pairs]) => {
                Ok(Value::Dict(self.copy_dict(pairs)?))
            }
            (Global::Items, []) => Ok(Value::List(Vec::new())),
            // The second argument of a deque is its maximum length.
            (Global::Items, &[items] | &[items, _]) => Ok(Value::List(self.copy_list(items)?)),
            (Global::Plain, _) => Ok(Value::Opaque),
            (Global::Size, &[items]) => {
                let sizes = self.items(items)?;
                if sizes.len() > MAX_DIMS {
                    return Err(BAD_ARGS.into());
                }
                Ok(Value::Tuple(sizes.to_vec()))
            }
            (Global::RebuildTensor, &[storage, offset, shape, stride]) => {
                self.tensor(storage, offset, shape, stride, false)
            }
            (
                Global::RebuildTensorV2,
                &[storage, offset, shape, stride, requires_grad, hooks, ref more @ ..],
            ) => {
                // Hooks act on gradients and change no value.
                let hooks_ok =
                    matches!(self.value(hooks), Value::Dict(_) | Value::Opaque | Value::Foreign(_));
                if !self.is_bool(requires_grad) || !hooks_ok || more.len() > 1 {
                    return Err(BAD_ARGS.into());
                }
                match more.first().map_or(Ok(false), |&id| self.is_negated(id)) {
                    Ok(negate) => self.tensor(storage, offset, shape, stride, negate),
                    Err(unsupported) => {
                        // The storage's reason is more specific.
                        let storage = match self.value(storage) {
                            Value::Foreign(storage) => storage.unsupported,
                            _ => None,
                        };
                        Ok(Value::Foreign(Foreign::tensor(storage.unwrap_or(unsupported)).into()))
                    }
                }
            }
            (Global::RebuildParameter, &[tensor, requires_grad, _])
            | (Global::RebuildParameterWithState, &[tensor, requires_grad, _, _]) => {
                if !self.is_bool(requires_grad) {
                    return Err(BAD_ARGS.into());
                }
                match self.value(tensor) {
                    Value::Tensor(tensor) => Ok(Value::Tensor(tensor.clone())),
                    Value::Foreign(foreign) => Ok(Value::Foreign(
                        Foreign::tensor(foreign.unsupported.unwrap_or(Unsupported::Foreign)).into(),
                    )),
                    _ => Err(BAD_ARGS.into()),
                }
            }
            (Global::RebuildFromType, &[function, class, arguments, _]) => {
                self.rebuild_from_type(function, class, arguments)
            }
            (Global::Unsupported(unsupported), _) => Ok(Value::Foreign(Foreign::tensor(unsupported).into())),
            _ => Err(BAD_ARGS.into()),
        }
    }

    /// Whether a view is negated, from the flags in the last argument of `_rebuild_tensor_v2`. Any other flag that is set is
    /// an error, as it may change values.
    fn is_negated(&self, flags: ValueId) -> Result<bool, Unsupported> {
        let entries = match self.value(flags) {
            Value::Opaque => return Ok(false),
            Value::Dict(entries) => entries,
            _ => return Err(Unsupported::Flag),
        };
        let mut negate = false;
        for &(key, value) in entries {
            match (self.value(key), self.value(value)) {
                (Value::Text("neg"), &Value::Bool(flag)) => negate = flag,
                (Value::Text(_), Value::Bool(false)) => {}
                _ => return Err(Unsupported::Flag),
            }
        }
        Ok(negate)
    }

    fn tensor(
        &self,
        storage: ValueId,
        offset: ValueId,
        shape: ValueId,
        stride: ValueId,
        negate: bool,
    ) -> Result<Value<'a>, PickleError> {
        let dtype = match self.value(storage) {
            Value::Storage(storage) => storage.dtype,
            Value::Foreign(foreign) => {
                let unsupported = foreign.unsupported.unwrap_or(Unsupported::Foreign);
                return Ok(Value::Foreign(Foreign::tensor(unsupported).into()));
            }
            _ => return Err("a tensor has no storage".into()),
        };
        if negate && matches!(dtype, Dtype::Bool | Dtype::U8) {
            return Ok(Value::Foreign(Foreign::tensor(Unsupported::Flag).into()));
        }
        let (shape, stride) = (self.items(shape)?, self.items(stride)?);
        if shape.len() != stride.len() || shape.len() > MAX_DIMS {
            return Err("the sizes and strides of a tensor do not match".into());
        }
        let size = |&id: &ValueId| {
            usize::try_from(self.number(id)?).map_err(|_| PickleError::from("a tensor is too large"))
        };
        let shape = shape.iter().map(size).collect::<Result<_, _>>()?;
        let stride = stride.iter().map(|&id| self.number(id)).collect::<Result<_, _>>()?;
        let offset = self.number(offset)?;
        Ok(Value::Tensor(Tensor { storage, offset, shape, stride, negate }.into()))
    }

    /// A tensor with attributes, which change no value, or an instance of a subclass, which only its own code can interpret.
    fn rebuild_from_type(
        &mut self,
        function: ValueId,
        class: ValueId,
        arguments: ValueId,
    ) -> Result<Value<'a>, PickleError> {
        let plain = match self.value(class) {
            Value::Foreign(class) => matches!(
                (class.module, class.name),
                ("torch" | "torch._tensor", "Tensor") | ("torch.nn.parameter", "Parameter" | "Buffer")
            ),
            _ => false,
        };
        let &Value::Global(name) = self.value(function) else {
            return Ok(Value::Foreign(Foreign::tensor(Unsupported::Foreign).into()));
        };
        let of_tensor = matches!(
            name,
            Global::RebuildTensor
                | Global::RebuildTensorV2
                | Global::RebuildParameter
                | Global::RebuildParameterWithState
        );
        match (name, plain && of_tensor) {
            (Global::Unsupported(unsupported), _) => Ok(Value::Foreign(Foreign::tensor(unsupported).into())),
            (_, false) => Ok(Value::Foreign(Foreign::tensor(Unsupported::Subclass).into())),
            (_, true) => {
                let arguments = self.items(arguments)?;
                let arguments = arguments[..arguments.len().min(MAX_DIMS + 1)].to_vec();
                self.call_global(name, &arguments)
            }
        }
    }

    /// Resolves a persistent ID: ("storage", type, key, location, size), in legacy files followed by None or a view
    /// (key, offset, size); or ("module", class, file, source) for a pickled module.
    pub fn persistent_load(&mut self, id: ValueId) -> Result<(), PickleError> {
        const BAD_ARGS: &str = "the persistent ID of a storage is malformed";
        let items = self.items(id)?;
        if let &[word, class, _, _] = items
            && matches!(self.value(word), Value::Text("module"))
        {
            self.push_id(class);
            return Ok(());
        }
        let &[word, kind, key, _, len, ref view @ ..] = items else { return Err(BAD_ARGS.into()) };
        let (&Value::Text("storage"), &Value::Text(key)) = (self.value(word), self.value(key)) else {
            return Err(BAD_ARGS.into());
        };
        let dtype = match self.value(kind) {
            &Value::Global(Global::StorageType(dtype)) => dtype,
            Value::Foreign(kind) if kind.storage.is_some() => {
                let storage = kind.storage.map(|(_, bytes)| (key, bytes));
                let made = Value::Foreign(Foreign { storage, ..kind.made() }.into());
                return self.push(made);
            }
            _ => return Err(BAD_ARGS.into()),
        };
        let (mut start, mut len) = (0, self.number(len)?);
        match *view {
            [] => {}
            [view] if matches!(self.value(view), Value::Opaque) => {}
            [view] => {
                let &[_, offset, size] = self.items(view)? else { return Err(BAD_ARGS.into()) };
                (start, len) = (self.number(offset)?, self.number(size)?);
            }
            _ => return Err(BAD_ARGS.into()),
        }
        self.push(Value::Storage(Storage { key, dtype, len, start }.into()))
    }
}
