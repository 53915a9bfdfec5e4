//! The pickle interpreter: a stack machine with a memo.

use std::collections::HashMap;

use super::globals::Global;
use super::opcode as op;
use super::{Foreign, MAX_OPS, PickleError, Value, ValueId};

const TRUNCATED: &str = "the pickle is truncated";
const STACK_UNDERFLOW: &str = "pickle stack underflow";
const BAD_INT: &str = "invalid integer in the pickle";
const TOO_MANY_VALUES: &str = "the pickle has too many values";

pub(super) struct Machine<'a> {
    bytes: &'a [u8],
    pub pos: usize,
    pub values: Vec<Value<'a>>,
    stack: Vec<ValueId>,
    /// Stack height at each mark.
    marks: Vec<usize>,
    memo: HashMap<u32, ValueId>,
    /// Total items copied by calls, bounded because one list can be passed to many calls.
    pub copied: usize,
}

impl<'a> Machine<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        let (values, stack, marks, memo) = (Vec::new(), Vec::new(), Vec::new(), HashMap::new());
        Self { bytes, pos: 0, values, stack, marks, memo, copied: 0 }
    }

    /// Runs to `STOP` and returns the top-level value.
    pub fn run(&mut self) -> Result<ValueId, PickleError> {
        for _ in 0..MAX_OPS {
            let op = self.byte()?;
            if op == op::STOP {
                return self.pop();
            }
            let done = self.stack_op(op)?
                || self.scalar_op(op)?
                || self.string_op(op)?
                || self.container_op(op)?
                || self.memo_op(op)?
                || self.object_op(op)?;
            if !done {
                return Err("unknown pickle opcode".into());
            }
        }
        Err(PickleError::Rejected(format!(
            "has a pickle of more than {MAX_OPS} opcodes; save only the network's weights"
        )))
    }

    fn read(&mut self, n: usize) -> Result<&'a [u8], PickleError> {
        let end = self.pos.checked_add(n).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            self.pos = self.bytes.len();
            return Err(TRUNCATED.into());
        };
        let bytes = &self.bytes[self.pos..end];
        self.pos = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        Ok(*self.read(N)?.first_chunk().ok_or(TRUNCATED)?)
    }

    fn byte(&mut self) -> Result<u8, PickleError> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32, PickleError> {
        self.array().map(u32::from_le_bytes)
    }

    /// Bytes preceded by their length, itself `width` (1, 4 or 8) bytes wide.
    fn length_prefixed(&mut self, width: usize) -> Result<&'a [u8], PickleError> {
        let n = match width {
            1 => self.byte()?.into(),
            4 => u64::from(self.u32()?),
            _ => u64::from_le_bytes(self.array()?),
        };
        self.read(usize::try_from(n).map_err(|_| TRUNCATED)?)
    }

    /// Bytes up to the newline, which is consumed but not returned.
    fn raw_line(&mut self) -> Result<&'a [u8], PickleError> {
        let rest = &self.bytes[self.pos..];
        let Some(n) = rest.iter().position(|&b| b == b'\n') else {
            self.pos = self.bytes.len();
            return Err(TRUNCATED.into());
        };
        Ok(&self.read(n + 1)?[..n])
    }

    fn line(&mut self) -> Result<&'a str, PickleError> {
        str::from_utf8(self.raw_line()?).map_err(|_| "a string is not UTF-8".into())
    }

    pub fn push(&mut self, value: Value<'a>) -> Result<(), PickleError> {
        let id = u32::try_from(self.values.len()).map_err(|_| TOO_MANY_VALUES)?;
        self.values.push(value);
        self.stack.push(ValueId(id));
        Ok(())
    }

    /// Pushes a string. Invalid UTF-8 (Python 2 byte strings, lone surrogates) becomes an opaque value.
    fn push_text(&mut self, bytes: &'a [u8]) -> Result<(), PickleError> {
        self.push(str::from_utf8(bytes).map_or(Value::Opaque, Value::Text))
    }

    fn pop(&mut self) -> Result<ValueId, PickleError> {
        // Values below the top mark are out of reach.
        if self.stack.len() <= self.marks.last().copied().unwrap_or(0) {
            return Err(STACK_UNDERFLOW.into());
        }
        self.stack.pop().ok_or(STACK_UNDERFLOW.into())
    }

    fn top(&self) -> Result<ValueId, PickleError> {
        self.stack.last().copied().ok_or(STACK_UNDERFLOW.into())
    }

    /// Pops everything above the top mark, and the mark.
    fn pop_to_mark(&mut self) -> Result<Vec<ValueId>, PickleError> {
        let height = self.marks.pop().ok_or("a mark is missing in the pickle")?;
        Ok(self.stack.split_off(height.min(self.stack.len())))
    }

    pub fn value(&self, id: ValueId) -> &Value<'a> {
        &self.values[id.0 as usize]
    }

    /// Protocol, frames, marks and stack manipulation.
    fn stack_op(&mut self, op: u8) -> Result<bool, PickleError> {
        match op {
            op::PROTO => {
                if self.byte()? > 5 {
                    return Err("the pickle protocol is newer than 5".into());
                }
            }
            op::FRAME => drop(self.read(8)?),
            op::MARK => self.marks.push(self.stack.len()),
            op::POP => match self.marks.last() {
                // As in Python, POP can remove the mark itself.
                Some(&height) if height == self.stack.len() => drop(self.marks.pop()),
                _ => drop(self.pop()?),
            },
            op::POP_MARK => drop(self.pop_to_mark()?),
            op::DUP => {
                let top = self.top()?;
                self.stack.push(top);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// A little-endian two's complement integer.
    fn parse_long(bytes: &[u8]) -> Value<'a> {
        let n = bytes.len();
        if n > 8 {
            return Value::Opaque;
        }
        let negate = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = if negate { [0xff; 8] } else { [0; 8] };
        wide[..n].copy_from_slice(bytes);
        Value::Int(i64::from_le_bytes(wide))
    }

    /// `None`, booleans and numbers.
    fn scalar_op(&mut self, op: u8) -> Result<bool, PickleError> {
        let value = match op {
            op::NONE => Value::Opaque,
            op::NEWTRUE => Value::Bool(true),
            op::NEWFALSE => Value::Bool(false),
            op::BININT1 => Value::Int(self.byte()?.into()),
            op::BININT2 => Value::Int(u16::from_le_bytes(self.array()?).into()),
            op::BININT => Value::Int(i32::from_le_bytes(self.array()?).into()),
            op::LONG1 => Self::parse_long(self.length_prefixed(1)?),
            op::LONG4 => Self::parse_long(self.length_prefixed(4)?),
            op::INT => match self.line()? {
                "00" => Value::Bool(false),
                "01" => Value::Bool(true),
                number => Value::Int(number.parse().map_err(|_| BAD_INT)?),
            },
            op::LONG => {
                let line = self.line()?;
                line.strip_suffix('L').unwrap_or(line).parse().map_or(Value::Opaque, Value::Int)
            }
            op::FLOAT => {
                self.line()?;
                Value::Opaque
            }
            op::BINFLOAT => {
                self.read(8)?;
                Value::Opaque
            }
            _ => return Ok(false),
        };
        self.push(value)?;
        Ok(true)
    }

    /// Strings and bytes of all protocols.
    fn string_op(&mut self, op: u8) -> Result<bool, PickleError> {
        let text = match op {
            op::BINUNICODE | op::BINSTRING => self.length_prefixed(4)?,
            op::SHORT_BINUNICODE | op::SHORT_BINSTRING => self.length_prefixed(1)?,
            op::BINUNICODE8 => self.length_prefixed(8)?,
            op::UNICODE => self.raw_line()?,
            op::STRING => {
                let line = self.raw_line()?;
                let quotes = |b: &u8| matches!(b, b'\'' | b'"');
                let start = line.iter().take_while(|b| quotes(b)).count();
                let line = &line[start..];
                &line[..line.len() - line.iter().rev().take_while(|b| quotes(b)).count()]
            }
            op::BINBYTES | op::SHORT_BINBYTES | op::BINBYTES8 | op::BYTEARRAY8 => {
                self.length_prefixed(match op {
                    op::SHORT_BINBYTES => 1,
                    op::BINBYTES => 4,
                    _ => 8,
                })?;
                self.push(Value::Opaque)?;
                return Ok(true);
            }
            _ => return Ok(false),
        };
        self.push_text(text)?;
        Ok(true)
    }

    /// Replaces the top `n` values with a tuple of them.
    fn tuple(&mut self, n: usize) -> Result<(), PickleError> {
        let mut items = Vec::with_capacity(n);
        for _ in 0..n {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push(Value::Tuple(items))
    }

    fn append(&mut self, items: &[ValueId]) -> Result<(), PickleError> {
        let list = self.top()?;
        match &mut self.values[list.0 as usize] {
            Value::List(list) => list.extend(items),
            // A list or set subclass: its items are never part of a network.
            Value::Foreign(_) => {}
            _ => return Err("the pickle appends to a value that is not a list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[ValueId]) -> Result<(), PickleError> {
        if !items.len().is_multiple_of(2) {
            return Err("the pickle has a key without a value".into());
        }
        let dict = self.top()?;
        let entries = match &mut self.values[dict.0 as usize] {
            Value::Dict(entries) => entries,
            Value::Foreign(foreign) => &mut foreign.entries,
            _ => return Err("the pickle sets an item of a value that is not a dict".into()),
        };
        entries.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
        Ok(())
    }

    fn container_op(&mut self, op: u8) -> Result<bool, PickleError> {
        match op {
            op::EMPTY_LIST | op::EMPTY_SET => self.push(Value::List(Vec::new()))?,
            op::EMPTY_TUPLE => self.push(Value::Tuple(Vec::new()))?,
            op::EMPTY_DICT => self.push(Value::Dict(Vec::new()))?,
            op::LIST | op::FROZENSET => {
                let items = self.pop_to_mark()?;
                self.push(Value::List(items))?;
            }
            op::TUPLE => {
                let items = self.pop_to_mark()?;
                self.push(Value::Tuple(items))?;
            }
            op::DICT => {
                let items = self.pop_to_mark()?;
                self.push(Value::Dict(Vec::new()))?;
                self.set_items(&items)?;
            }
            op::TUPLE1 => self.tuple(1)?,
            op::TUPLE2 => self.tuple(2)?,
            op::TUPLE3 => self.tuple(3)?,
            op::APPEND => {
                let item = self.pop()?;
                self.append(&[item])?;
            }
            op::APPENDS | op::ADDITEMS => {
                let items = self.pop_to_mark()?;
                self.append(&items)?;
            }
            op::SETITEM => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(&[key, value])?;
            }
            op::SETITEMS => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Memo access.
    fn memo_op(&mut self, op: u8) -> Result<bool, PickleError> {
        let index = match op {
            op::BINPUT | op::BINGET => self.byte()?.into(),
            op::LONG_BINPUT | op::LONG_BINGET => self.u32()?,
            op::PUT | op::GET => self.line()?.parse().map_err(|_| BAD_INT)?,
            op::MEMOIZE => u32::try_from(self.memo.len()).map_err(|_| TOO_MANY_VALUES)?,
            _ => return Ok(false),
        };
        if matches!(op, op::BINGET | op::LONG_BINGET | op::GET) {
            let id = *self.memo.get(&index).ok_or("the pickle reads an unset memo entry")?;
            self.stack.push(id);
        } else {
            let top = self.top()?;
            self.memo.insert(index, top);
        }
        Ok(true)
    }

    /// Globals, and the objects created from them.
    fn object_op(&mut self, op: u8) -> Result<bool, PickleError> {
        match op {
            op::GLOBAL => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Global::resolve(module, name))?;
            }
            op::STACK_GLOBAL => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (&Value::Text(module), &Value::Text(name)) = (self.value(module), self.value(name))
                else {
                    return Err("the pickle names a global with a value that is not a string".into());
                };
                self.push(Global::resolve(module, name))?;
            }
            op::INST => {
                let (module, name) = (self.line()?, self.line()?);
                let arguments = self.pop_to_mark()?;
                self.push(Global::resolve(module, name))?;
                let class = self.pop()?;
                self.call(class, &arguments)?;
            }
            op::OBJ => {
                let items = self.pop_to_mark()?;
                let (&class, arguments) = items.split_first().ok_or(STACK_UNDERFLOW)?;
                self.call(class, arguments)?;
            }
            op::REDUCE | op::NEWOBJ => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.call_with(function, arguments)?;
            }
            op::NEWOBJ_EX => {
                let (_keywords, arguments, class) = (self.pop()?, self.pop()?, self.pop()?);
                self.call_with(class, arguments)?;
            }
            op::BUILD => {
                let state = self.pop()?;
                self.build(state)?;
            }
            op::BINPERSID => {
                let id = self.pop()?;
                self.persistent_load(id)?;
            }
            op::PERSID => {
                return Err(PickleError::Rejected(
                    "uses text persistent IDs, which PyTorch does not write".into(),
                ));
            }
            op::EXT1..=op::EXT4 => {
                return Err(PickleError::Rejected(
                    "uses extension codes registered by another program (EXT1 to EXT4)".into(),
                ));
            }
            op::NEXT_BUFFER | op::READONLY_BUFFER => {
                return Err(PickleError::Rejected(
                    "refers to out-of-band buffers, which are not in the file".into(),
                ));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Sets the attributes of the value on top of the stack.
    fn build(&mut self, state: ValueId) -> Result<(), PickleError> {
        let top = self.top()?;
        let foreign = match &mut self.values[top.0 as usize] {
            Value::Foreign(foreign) => {
                foreign.state = Some(state);
                return Ok(());
            }
            // Attributes of an OrderedDict (PyTorch's module versions), a list subclass or an opaque value are dropped.
            Value::Dict(_) | Value::List(_) | Value::Opaque => return Ok(()),
            Value::Tensor(_) | Value::Storage(_) => Foreign::tensor_with_state(),
            _ => return Err("the pickle sets attributes of a value that cannot have any".into()),
        };
        self.values[top.0 as usize] = Value::Foreign(foreign.into());
        Ok(())
    }

    /// Pushes an existing value.
    pub fn push_id(&mut self, id: ValueId) {
        self.stack.push(id);
    }
}
