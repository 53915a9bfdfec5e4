//! Pickles, as PyTorch writes them, read without running anything.
//!
//! A pickle is a program for a stack machine, and may name any function of Python to be called. Here the machine knows a
//! closed list of names: ordered dictionaries, the types of storages, the functions that make a tensor of a storage, and a
//! few plain values. Every other name ends the reading with an error that says it.
//!
//! All values live in one list and refer to each other by their places in it: a value that holds itself, or is held ten
//! thousand deep, is nothing special, and each byte of the file makes at most one value.

use std::collections::HashMap;

use super::dtype::Dtype;

/// Longest pickle that is read, in bytes; those of large networks have some hundred thousand.
pub(super) const MAX_PICKLE: usize = 4 << 20;
/// Most extents of a tensor, and most arguments of a call.
const MAX_DIMS: usize = 16;
/// Modules of Python whose functions act on the machine.
const DANGEROUS: [&str; 16] = [
    "os",
    "posix",
    "nt",
    "sys",
    "subprocess",
    "builtins",
    "__builtin__",
    "shutil",
    "socket",
    "importlib",
    "runpy",
    "pty",
    "ctypes",
    "pickle",
    "operator",
    "functools",
];

/// The place of a value in a [`Pickle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Id(u32);

/// What a value is.
#[derive(Debug)]
pub(super) enum Value<'a> {
    /// `None`, and what has no meaning here: fractions, bytes, numbers of more than 64 bits, `torch.device`.
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
}

/// Numbers that tensors are made of.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Storage<'a> {
    /// Its name in the file.
    pub key: &'a str,
    pub dtype: Dtype,
    /// How many numbers it has.
    pub numbers: u64,
    /// Where in the storage it begins, in numbers, if it is a part of one (old files only).
    pub from: u64,
}

impl Storage<'_> {
    /// Its numbers' bytes in those of the whole it is a part of; `None` if there are fewer.
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
}

/// The names that a pickle may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    OrderedDict,
    Set,
    StorageType(Dtype),
    RebuildTensor,
    RebuildParameter,
    Size,
    Device,
}

impl Name {
    /// The one of this module and name; the error says why it is not read.
    fn find(module: &str, name: &str) -> Result<Value<'static>, String> {
        Ok(Value::Name(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("builtins" | "__builtin__", "set" | "frozenset") => Self::Set,
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "Size") => Self::Size,
            ("torch", "device") => Self::Device,
            ("torch" | "torch.cuda", storage) if storage.ends_with("Storage") => {
                match Dtype::of_storage(storage) {
                    Some(dtype) => Self::StorageType(dtype),
                    None => {
                        return Err(format!(
                            "holds a {module}.{storage}, which is not read; storages of {} are: convert the tensors, in \
                             PyTorch with tensor.float()",
                            Dtype::ALL.map(Dtype::name).join(", ")
                        ));
                    }
                }
            }
            // A number type, as training scripts note it.
            ("torch", "float64" | "float32" | "float16" | "bfloat16") => return Ok(Value::Nothing),
            _ => return Err(refusal(module, name)),
        }))
    }
}

/// What to say of a name outside the closed list.
fn refusal(module: &str, name: &str) -> String {
    let full: String = format!("{module}.{name}").chars().filter(|c| !c.is_control()).take(200).collect();
    let top = module.split('.').next().unwrap_or_default();
    if DANGEROUS.contains(&top) {
        return format!(
            "would call {full} when Python loads it: the file runs code of its own, as an attack does. Nothing of it was \
             run, for ddpm never runs code from a file; do not load it in Python unless you know where it is from"
        );
    }
    format!(
        "needs {full}, which only code outside the file could make; ddpm never runs any, and reads tensors, dictionaries, \
         lists, text and numbers alone. Save the weights alone, in PyTorch: torch.save(model.state_dict(), FILE)"
    )
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
        let mut machine = Machine {
            bytes: &bytes[..bytes.len().min(MAX_PICKLE)],
            at: 0,
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            copied: 0,
        };
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

    /// All storages, as often as they are named.
    pub fn storages(&self) -> impl Iterator<Item = &Storage<'a>> {
        self.values.iter().filter_map(|value| match value {
            Value::Storage(storage) => Some(&**storage),
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

const SHORT: &str = "it ends in the middle of a pickle";
const EMPTY: &str = "its pickle takes a value that is not there";

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Items of lists that calls have copied: a list may be given to many calls.
    copied: usize,
}

impl<'a> Machine<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], Stop> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            self.at = self.bytes.len();
            return Err(SHORT.into());
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        Ok(*self.take(N)?.first_chunk().ok_or(SHORT)?)
    }

    fn byte(&mut self) -> Result<u8, Stop> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32, Stop> {
        self.array().map(u32::from_le_bytes)
    }

    /// A length in eight bytes.
    fn length8(&mut self) -> Result<usize, Stop> {
        let n = self.array().map(u64::from_le_bytes)?;
        usize::try_from(n).map_err(|_| SHORT.into())
    }

    /// The text up to the end of the line.
    fn line(&mut self) -> Result<&'a str, Stop> {
        let rest = &self.bytes[self.at..];
        let Some(n) = rest.iter().position(|&b| b == b'\n') else {
            self.at = self.bytes.len();
            return Err(SHORT.into());
        };
        let line = self.take(n + 1)?;
        text(&line[..n])
    }

    fn push(&mut self, value: Value<'a>) -> Result<(), Stop> {
        // Each byte makes at most one value, and there are less than 2^32 bytes.
        let id = u32::try_from(self.values.len()).map_err(|_| "its pickle is too long")?;
        self.values.push(value);
        self.stack.push(Id(id));
        Ok(())
    }

    fn push_text(&mut self, bytes: &'a [u8]) -> Result<(), Stop> {
        let text = text(bytes)?;
        self.push(Value::Text(text))
    }

    fn pop(&mut self) -> Result<Id, Stop> {
        // What stands below a mark is not there for the commands behind it.
        if self.stack.len() <= self.marks.last().copied().unwrap_or(0) {
            return Err(EMPTY.into());
        }
        self.stack.pop().ok_or(EMPTY.into())
    }

    fn top(&self) -> Result<Id, Stop> {
        self.stack.last().copied().ok_or(EMPTY.into())
    }

    /// Everything behind the last mark.
    fn pop_mark(&mut self) -> Result<Vec<Id>, Stop> {
        let height = self.marks.pop().ok_or("its pickle has a mark too few")?;
        Ok(self.stack.split_off(height.min(self.stack.len())))
    }

    fn value(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize]
    }

    /// Puts a tuple of the last `n` values in their place.
    fn tuple(&mut self, n: usize) -> Result<(), Stop> {
        let mut items = Vec::with_capacity(n);
        for _ in 0..n {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push(Value::Tuple(items))
    }

    fn remember(&mut self, place: u32) -> Result<(), Stop> {
        let top = self.top()?;
        self.memo.insert(place, top);
        Ok(())
    }

    fn recall(&mut self, place: u32) -> Result<(), Stop> {
        let id = *self.memo.get(&place).ok_or("its pickle recalls a value that it did not keep")?;
        self.stack.push(id);
        Ok(())
    }

    fn append(&mut self, items: &[Id]) -> Result<(), Stop> {
        let list = self.top()?;
        match &mut self.values[list.0 as usize] {
            Value::List(list) => {
                list.extend(items);
                Ok(())
            }
            _ => Err("its pickle appends to what is no list".into()),
        }
    }

    fn set_items(&mut self, items: &[Id]) -> Result<(), Stop> {
        if !items.len().is_multiple_of(2) {
            return Err("its pickle has a key without a value".into());
        }
        let dict = self.top()?;
        match &mut self.values[dict.0 as usize] {
            Value::Dict(entries) => {
                entries.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                Ok(())
            }
            _ => Err("its pickle sets an entry of what is no dictionary".into()),
        }
    }

    fn name(&mut self, module: &str, name: &str) -> Result<(), Stop> {
        let value = Name::find(module, name).map_err(Stop::Refused)?;
        self.push(value)
    }

    /// A whole number in two's complement, little end first.
    fn long(&mut self, n: usize) -> Result<(), Stop> {
        let bytes = self.take(n)?;
        if n > 8 {
            return self.push(Value::Nothing);
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = if negative { [0xff; 8] } else { [0; 8] };
        wide[..n].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    fn run(&mut self) -> Result<Id, Stop> {
        loop {
            let op = self.byte()?;
            match op {
                b'.' => return self.pop(),
                // PROTO, FRAME: nothing to do.
                0x80 => {
                    let protocol = self.byte()?;
                    if protocol > 5 {
                        return Err("its pickle is of a later protocol than 5".into());
                    }
                }
                0x95 => drop(self.take(8)?),
                b'(' => self.marks.push(self.stack.len()),
                b'0' => match self.marks.last() {
                    // As Python: what is popped may be the mark itself.
                    Some(&height) if height == self.stack.len() => drop(self.marks.pop()),
                    _ => drop(self.pop()?),
                },
                b'1' => drop(self.pop_mark()?),
                b'2' => {
                    let top = self.top()?;
                    self.stack.push(top);
                }
                b'N' => self.push(Value::Nothing)?,
                0x88 => self.push(Value::Bool(true))?,
                0x89 => self.push(Value::Bool(false))?,
                b'K' => {
                    let v = self.byte()?;
                    self.push(Value::Int(v.into()))?;
                }
                b'M' => {
                    let v = u16::from_le_bytes(self.array()?);
                    self.push(Value::Int(v.into()))?;
                }
                b'J' => {
                    let v = i32::from_le_bytes(self.array()?);
                    self.push(Value::Int(v.into()))?;
                }
                0x8a => {
                    let n = self.byte()?;
                    self.long(n.into())?;
                }
                0x8b => {
                    let n = self.u32()?;
                    self.long(n as usize)?;
                }
                b'I' => {
                    let value = match self.line()? {
                        "00" => Value::Bool(false),
                        "01" => Value::Bool(true),
                        number => Value::Int(number.parse().map_err(|_| "its pickle has no number for one")?),
                    };
                    self.push(value)?;
                }
                b'L' => {
                    let line = self.line()?;
                    let line = line.strip_suffix('L').unwrap_or(line);
                    let value = line.parse().map_or(Value::Nothing, Value::Int);
                    self.push(value)?;
                }
                b'F' => {
                    self.line()?;
                    self.push(Value::Nothing)?;
                }
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Nothing)?;
                }
                // Text of all ages.
                b'X' => {
                    let n = self.u32()?;
                    let bytes = self.take(n as usize)?;
                    self.push_text(bytes)?;
                }
                0x8c | b'U' => {
                    let n = self.byte()?;
                    let bytes = self.take(n.into())?;
                    self.push_text(bytes)?;
                }
                0x8d => {
                    let n = self.length8()?;
                    let bytes = self.take(n)?;
                    self.push_text(bytes)?;
                }
                b'T' => {
                    let n = self.u32()?;
                    let bytes = self.take(n as usize)?;
                    self.push_text(bytes)?;
                }
                b'V' => {
                    let line = self.line()?;
                    self.push(Value::Text(line))?;
                }
                b'S' => {
                    let line = self.line()?;
                    self.push(Value::Text(line.trim_matches(['\'', '"'])))?;
                }
                b'B' | 0x8e | 0x96 | b'C' => {
                    let n = match op {
                        b'C' => self.byte()?.into(),
                        b'B' => self.u32()? as usize,
                        _ => self.length8()?,
                    };
                    self.take(n)?;
                    self.push(Value::Nothing)?;
                }
                // Containers.
                b']' | 0x8f => self.push(Value::List(Vec::new()))?,
                b')' => self.push(Value::Tuple(Vec::new()))?,
                b'}' => self.push(Value::Dict(Vec::new()))?,
                b'l' | 0x91 => {
                    let items = self.pop_mark()?;
                    self.push(Value::List(items))?;
                }
                b't' => {
                    let items = self.pop_mark()?;
                    self.push(Value::Tuple(items))?;
                }
                b'd' => {
                    let items = self.pop_mark()?;
                    self.push(Value::Dict(Vec::new()))?;
                    self.set_items(&items)?;
                }
                0x85 => self.tuple(1)?,
                0x86 => self.tuple(2)?,
                0x87 => self.tuple(3)?,
                b'a' => {
                    let item = self.pop()?;
                    self.append(&[item])?;
                }
                b'e' | 0x90 => {
                    let items = self.pop_mark()?;
                    self.append(&items)?;
                }
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.set_items(&[key, value])?;
                }
                b'u' => {
                    let items = self.pop_mark()?;
                    self.set_items(&items)?;
                }
                // What is kept.
                b'q' => {
                    let place = self.byte()?;
                    self.remember(place.into())?;
                }
                b'r' => {
                    let place = self.u32()?;
                    self.remember(place)?;
                }
                b'p' => {
                    let place = self.line()?.parse().map_err(|_| "its pickle has no number for one")?;
                    self.remember(place)?;
                }
                0x94 => {
                    let place = u32::try_from(self.memo.len()).map_err(|_| "its pickle is too long")?;
                    self.remember(place)?;
                }
                b'h' => {
                    let place = self.byte()?;
                    self.recall(place.into())?;
                }
                b'j' => {
                    let place = self.u32()?;
                    self.recall(place)?;
                }
                b'g' => {
                    let place = self.line()?.parse().map_err(|_| "its pickle has no number for one")?;
                    self.recall(place)?;
                }
                // Names, and what is done with them.
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.name(module, name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (&Value::Text(module), &Value::Text(name)) = (self.value(module), self.value(name))
                    else {
                        return Err("its pickle names something without text".into());
                    };
                    self.name(module, name)?;
                }
                b'i' => {
                    let (module, name) = (self.line()?, self.line()?);
                    return Err(Stop::Refused(refusal(module, name)));
                }
                b'R' | 0x81 => {
                    let (arguments, function) = (self.pop()?, self.pop()?);
                    let made = self.call(function, arguments)?;
                    self.push(made)?;
                }
                b'b' => {
                    // What an ordered dictionary has besides its entries (PyTorch's versions of modules).
                    self.pop()?;
                    if !matches!(self.value(self.top()?), Value::Dict(_)) {
                        return Err(Stop::Refused(refusal("an object's own", "__setstate__")));
                    }
                }
                b'Q' => {
                    let id = self.pop()?;
                    let storage = self.stored(id)?;
                    self.push(storage)?;
                }
                b'P' => {
                    return Err(Stop::Refused("names what it holds in a way that PyTorch does not".into()));
                }
                b'o' | 0x92 => return Err(Stop::Refused(refusal("an object", "__new__"))),
                0x82..=0x84 => {
                    return Err(Stop::Refused("uses names that are registered in some program".into()));
                }
                0x97 | 0x98 => {
                    return Err(Stop::Refused("has parts outside the file (a pickle's buffers)".into()));
                }
                _ => return Err("its pickle has a command that there is not".into()),
            }
        }
    }

    /// The items of a tuple.
    fn items(&self, id: Id) -> Result<&[Id], Stop> {
        match self.value(id) {
            Value::Tuple(items) => Ok(items),
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

    fn copy_list(&mut self, id: Id) -> Result<Vec<Id>, Stop> {
        let Value::List(items) = self.value(id) else {
            return Err("its pickle has something else where a list belongs".into());
        };
        let items = items.clone();
        self.copied += items.len();
        if self.copied > MAX_PICKLE { Err("its pickle copies lists without end".into()) } else { Ok(items) }
    }

    fn call(&mut self, function: Id, arguments: Id) -> Result<Value<'a>, Stop> {
        let Value::Name(name) = *self.value(function) else {
            return Err("its pickle calls what is no function".into());
        };
        const ODD: &str = "one of its calls has other arguments than PyTorch's";
        let arguments = self.items(arguments)?;
        if arguments.len() > MAX_DIMS {
            return Err(ODD.into());
        }
        let arguments = arguments.to_vec();
        match name {
            Name::OrderedDict => match arguments[..] {
                [] => Ok(Value::Dict(Vec::new())),
                [pairs] => {
                    let pairs = self.copy_list(pairs)?;
                    let pair = |&id: &Id| match self.items(id)? {
                        &[key, value] => Ok((key, value)),
                        _ => Err(Stop::from(ODD)),
                    };
                    Ok(Value::Dict(pairs.iter().map(pair).collect::<Result<_, _>>()?))
                }
                _ => Err(ODD.into()),
            },
            Name::Set => match arguments[..] {
                [] => Ok(Value::List(Vec::new())),
                [items] => Ok(Value::List(self.copy_list(items)?)),
                _ => Err(ODD.into()),
            },
            Name::Size => {
                let &[items] = &arguments[..] else { return Err(ODD.into()) };
                let sizes = self.items(items)?;
                if sizes.len() > MAX_DIMS {
                    return Err(ODD.into());
                }
                Ok(Value::Tuple(sizes.to_vec()))
            }
            Name::Device => Ok(Value::Nothing),
            Name::StorageType(_) => Err(ODD.into()),
            Name::RebuildTensor => {
                let &[storage, offset, shape, stride, ..] = &arguments[..] else { return Err(ODD.into()) };
                if !matches!(self.value(storage), Value::Storage(_)) {
                    return Err("one of its tensors has no storage".into());
                }
                let (shape, stride) = (self.items(shape)?, self.items(stride)?);
                if shape.len() != stride.len() || shape.len() > MAX_DIMS {
                    return Err("one of its tensors has sizes and strides that do not fit".into());
                }
                let size = |&id: &Id| {
                    usize::try_from(self.number(id)?)
                        .map_err(|_| Stop::from("one of its tensors is too large"))
                };
                let shape = shape.iter().map(size).collect::<Result<_, _>>()?;
                let stride = stride.iter().map(|&id| self.number(id)).collect::<Result<_, _>>()?;
                Ok(Value::Tensor(Tensor { storage, offset: self.number(offset)?, shape, stride }.into()))
            }
            Name::RebuildParameter => {
                let Some(&tensor) = arguments.first() else { return Err(ODD.into()) };
                match self.value(tensor) {
                    Value::Tensor(tensor) => Ok(Value::Tensor(tensor.clone())),
                    _ => Err(ODD.into()),
                }
            }
        }
    }

    /// The storage that a persistent id names: ("storage", type, key, location, numbers), in old files with a view
    /// (key, offset, numbers) of it or None behind that.
    fn stored(&self, id: Id) -> Result<Value<'a>, Stop> {
        const ODD: &str = "one of its storages is named in another way than PyTorch's";
        let items = self.items(id)?;
        let &[word, kind, key, _, numbers, ref view @ ..] = items else { return Err(ODD.into()) };
        let (&Value::Text(word), &Value::Text(key)) = (self.value(word), self.value(key)) else {
            return Err(ODD.into());
        };
        let &Value::Name(Name::StorageType(dtype)) = self.value(kind) else { return Err(ODD.into()) };
        if word != "storage" {
            return Err(ODD.into());
        }
        let (mut from, mut numbers) = (0, self.number(numbers)?);
        if let [view] = view
            && !matches!(self.value(*view), Value::Nothing)
        {
            let &[_, offset, size] = self.items(*view)? else { return Err(ODD.into()) };
            (from, numbers) = (self.number(offset)?, self.number(size)?);
        }
        Ok(Value::Storage(Storage { key, dtype, numbers, from }.into()))
    }
}

fn text(bytes: &[u8]) -> Result<&str, Stop> {
    str::from_utf8(bytes).map_err(|_| "it has text that is not UTF-8".into())
}
