//! The stack machine.

use std::collections::HashMap;

use super::calls::Name;
use super::{Id, MAX_COMMANDS, Other, Stop, Value};

/// The commands of all protocols, by the names of Python's pickletools.
mod op {
    pub const MARK: u8 = b'(';
    pub const STOP: u8 = b'.';
    pub const POP: u8 = b'0';
    pub const POP_MARK: u8 = b'1';
    pub const DUP: u8 = b'2';
    pub const PROTO: u8 = 0x80;
    pub const FRAME: u8 = 0x95;

    pub const NONE: u8 = b'N';
    pub const NEWTRUE: u8 = 0x88;
    pub const NEWFALSE: u8 = 0x89;
    pub const INT: u8 = b'I';
    pub const BININT: u8 = b'J';
    pub const BININT1: u8 = b'K';
    pub const BININT2: u8 = b'M';
    pub const LONG: u8 = b'L';
    pub const LONG1: u8 = 0x8a;
    pub const LONG4: u8 = 0x8b;
    pub const FLOAT: u8 = b'F';
    pub const BINFLOAT: u8 = b'G';

    pub const STRING: u8 = b'S';
    pub const BINSTRING: u8 = b'T';
    pub const SHORT_BINSTRING: u8 = b'U';
    pub const UNICODE: u8 = b'V';
    pub const BINUNICODE: u8 = b'X';
    pub const SHORT_BINUNICODE: u8 = 0x8c;
    pub const BINUNICODE8: u8 = 0x8d;
    pub const BINBYTES: u8 = b'B';
    pub const SHORT_BINBYTES: u8 = b'C';
    pub const BINBYTES8: u8 = 0x8e;
    pub const BYTEARRAY8: u8 = 0x96;

    pub const EMPTY_LIST: u8 = b']';
    pub const EMPTY_TUPLE: u8 = b')';
    pub const EMPTY_DICT: u8 = b'}';
    pub const EMPTY_SET: u8 = 0x8f;
    pub const LIST: u8 = b'l';
    pub const TUPLE: u8 = b't';
    pub const TUPLE1: u8 = 0x85;
    pub const TUPLE2: u8 = 0x86;
    pub const TUPLE3: u8 = 0x87;
    pub const DICT: u8 = b'd';
    pub const FROZENSET: u8 = 0x91;
    pub const APPEND: u8 = b'a';
    pub const APPENDS: u8 = b'e';
    pub const ADDITEMS: u8 = 0x90;
    pub const SETITEM: u8 = b's';
    pub const SETITEMS: u8 = b'u';

    pub const PUT: u8 = b'p';
    pub const BINPUT: u8 = b'q';
    pub const LONG_BINPUT: u8 = b'r';
    pub const MEMOIZE: u8 = 0x94;
    pub const GET: u8 = b'g';
    pub const BINGET: u8 = b'h';
    pub const LONG_BINGET: u8 = b'j';

    pub const GLOBAL: u8 = b'c';
    pub const STACK_GLOBAL: u8 = 0x93;
    pub const REDUCE: u8 = b'R';
    pub const BUILD: u8 = b'b';
    pub const INST: u8 = b'i';
    pub const OBJ: u8 = b'o';
    pub const NEWOBJ: u8 = 0x81;
    pub const NEWOBJ_EX: u8 = 0x92;
    pub const PERSID: u8 = b'P';
    pub const BINPERSID: u8 = b'Q';
    pub const EXT1: u8 = 0x82;
    pub const EXT4: u8 = 0x84;
    pub const NEXT_BUFFER: u8 = 0x97;
    pub const READONLY_BUFFER: u8 = 0x98;
}

const SHORT: &str = "it ends in the middle of a pickle";
const EMPTY: &str = "its pickle takes a value that is not there";
const NO_NUMBER: &str = "its pickle has no number for one";
const TOO_LONG: &str = "its pickle is too long";

pub(super) struct Machine<'a> {
    bytes: &'a [u8],
    pub at: usize,
    pub values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Items of lists that calls have copied: a list may be given to many calls.
    pub copied: usize,
}

impl<'a> Machine<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        let (values, stack, marks, memo) = (Vec::new(), Vec::new(), Vec::new(), HashMap::new());
        Self { bytes, at: 0, values, stack, marks, memo, copied: 0 }
    }

    /// Runs to the end, and gives what the pickle is of.
    pub fn run(&mut self) -> Result<Id, Stop> {
        for _ in 0..MAX_COMMANDS {
            let op = self.byte()?;
            if op == op::STOP {
                return self.pop();
            }
            let done = self.arrange(op)?
                || self.plain(op)?
                || self.text(op)?
                || self.container(op)?
                || self.memory(op)?
                || self.object(op)?;
            if !done {
                return Err("its pickle has a command that there is not".into());
            }
        }
        Err(Stop::Refused(format!(
            "has a pickle of more than {MAX_COMMANDS} commands; save the network's weights alone"
        )))
    }

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

    /// The bytes behind their length, which has one, four or eight bytes.
    fn counted(&mut self, width: usize) -> Result<&'a [u8], Stop> {
        let n = match width {
            1 => self.byte()?.into(),
            4 => u64::from(self.u32()?),
            _ => u64::from_le_bytes(self.array()?),
        };
        self.take(usize::try_from(n).map_err(|_| SHORT)?)
    }

    /// The bytes up to the end of the line.
    fn raw_line(&mut self) -> Result<&'a [u8], Stop> {
        let rest = &self.bytes[self.at..];
        let Some(n) = rest.iter().position(|&b| b == b'\n') else {
            self.at = self.bytes.len();
            return Err(SHORT.into());
        };
        Ok(&self.take(n + 1)?[..n])
    }

    fn line(&mut self) -> Result<&'a str, Stop> {
        str::from_utf8(self.raw_line()?).map_err(|_| "it has text that is not UTF-8".into())
    }

    pub fn push(&mut self, value: Value<'a>) -> Result<(), Stop> {
        let id = u32::try_from(self.values.len()).map_err(|_| TOO_LONG)?;
        self.values.push(value);
        self.stack.push(Id(id));
        Ok(())
    }

    /// Text; what is not UTF-8 is bytes, as Python 2 has them, or has half of a surrogate pair.
    fn push_text(&mut self, bytes: &'a [u8]) -> Result<(), Stop> {
        self.push(str::from_utf8(bytes).map_or(Value::Nothing, Value::Text))
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

    pub fn value(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize]
    }

    /// Marks, frames, and what moves values on the stack.
    fn arrange(&mut self, op: u8) -> Result<bool, Stop> {
        match op {
            op::PROTO => {
                if self.byte()? > 5 {
                    return Err("its pickle is of a later protocol than 5".into());
                }
            }
            op::FRAME => drop(self.take(8)?),
            op::MARK => self.marks.push(self.stack.len()),
            op::POP => match self.marks.last() {
                // As Python: what is popped may be the mark itself.
                Some(&height) if height == self.stack.len() => drop(self.marks.pop()),
                _ => drop(self.pop()?),
            },
            op::POP_MARK => drop(self.pop_mark()?),
            op::DUP => {
                let top = self.top()?;
                self.stack.push(top);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// An integer in two's complement, little end first.
    fn long(bytes: &[u8]) -> Value<'a> {
        let n = bytes.len();
        if n > 8 {
            return Value::Nothing;
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = if negative { [0xff; 8] } else { [0; 8] };
        wide[..n].copy_from_slice(bytes);
        Value::Int(i64::from_le_bytes(wide))
    }

    /// None, flags, and scalars.
    fn plain(&mut self, op: u8) -> Result<bool, Stop> {
        let value = match op {
            op::NONE => Value::Nothing,
            op::NEWTRUE => Value::Bool(true),
            op::NEWFALSE => Value::Bool(false),
            op::BININT1 => Value::Int(self.byte()?.into()),
            op::BININT2 => Value::Int(u16::from_le_bytes(self.array()?).into()),
            op::BININT => Value::Int(i32::from_le_bytes(self.array()?).into()),
            op::LONG1 => Self::long(self.counted(1)?),
            op::LONG4 => Self::long(self.counted(4)?),
            op::INT => match self.line()? {
                "00" => Value::Bool(false),
                "01" => Value::Bool(true),
                number => Value::Int(number.parse().map_err(|_| NO_NUMBER)?),
            },
            op::LONG => {
                let line = self.line()?;
                line.strip_suffix('L').unwrap_or(line).parse().map_or(Value::Nothing, Value::Int)
            }
            op::FLOAT => {
                self.line()?;
                Value::Nothing
            }
            op::BINFLOAT => {
                self.take(8)?;
                Value::Nothing
            }
            _ => return Ok(false),
        };
        self.push(value)?;
        Ok(true)
    }

    /// Text and bytes of all ages.
    fn text(&mut self, op: u8) -> Result<bool, Stop> {
        let text = match op {
            op::BINUNICODE | op::BINSTRING => self.counted(4)?,
            op::SHORT_BINUNICODE | op::SHORT_BINSTRING => self.counted(1)?,
            op::BINUNICODE8 => self.counted(8)?,
            op::UNICODE => self.raw_line()?,
            op::STRING => {
                let line = self.raw_line()?;
                let quotes = |b: &u8| matches!(b, b'\'' | b'"');
                let from = line.iter().take_while(|b| quotes(b)).count();
                let line = &line[from..];
                &line[..line.len() - line.iter().rev().take_while(|b| quotes(b)).count()]
            }
            op::BINBYTES | op::SHORT_BINBYTES | op::BINBYTES8 | op::BYTEARRAY8 => {
                self.counted(match op {
                    op::SHORT_BINBYTES => 1,
                    op::BINBYTES => 4,
                    _ => 8,
                })?;
                self.push(Value::Nothing)?;
                return Ok(true);
            }
            _ => return Ok(false),
        };
        self.push_text(text)?;
        Ok(true)
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

    fn append(&mut self, items: &[Id]) -> Result<(), Stop> {
        let list = self.top()?;
        match &mut self.values[list.0 as usize] {
            Value::List(list) => list.extend(items),
            // Of a class of lists or sets: its items are no part of any network.
            Value::Other(_) => {}
            _ => return Err("its pickle appends to what is no list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Result<(), Stop> {
        if !items.len().is_multiple_of(2) {
            return Err("its pickle has a key without a value".into());
        }
        let dict = self.top()?;
        let entries = match &mut self.values[dict.0 as usize] {
            Value::Dict(entries) => entries,
            Value::Other(other) => &mut other.entries,
            _ => return Err("its pickle sets an entry of what is no dictionary".into()),
        };
        entries.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
        Ok(())
    }

    fn container(&mut self, op: u8) -> Result<bool, Stop> {
        match op {
            op::EMPTY_LIST | op::EMPTY_SET => self.push(Value::List(Vec::new()))?,
            op::EMPTY_TUPLE => self.push(Value::Tuple(Vec::new()))?,
            op::EMPTY_DICT => self.push(Value::Dict(Vec::new()))?,
            op::LIST | op::FROZENSET => {
                let items = self.pop_mark()?;
                self.push(Value::List(items))?;
            }
            op::TUPLE => {
                let items = self.pop_mark()?;
                self.push(Value::Tuple(items))?;
            }
            op::DICT => {
                let items = self.pop_mark()?;
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
                let items = self.pop_mark()?;
                self.append(&items)?;
            }
            op::SETITEM => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(&[key, value])?;
            }
            op::SETITEMS => {
                let items = self.pop_mark()?;
                self.set_items(&items)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What is kept, and taken up again.
    fn memory(&mut self, op: u8) -> Result<bool, Stop> {
        let place = match op {
            op::BINPUT | op::BINGET => self.byte()?.into(),
            op::LONG_BINPUT | op::LONG_BINGET => self.u32()?,
            op::PUT | op::GET => self.line()?.parse().map_err(|_| NO_NUMBER)?,
            op::MEMOIZE => u32::try_from(self.memo.len()).map_err(|_| TOO_LONG)?,
            _ => return Ok(false),
        };
        if matches!(op, op::BINGET | op::LONG_BINGET | op::GET) {
            let id = *self.memo.get(&place).ok_or("its pickle recalls a value that it did not keep")?;
            self.stack.push(id);
        } else {
            let top = self.top()?;
            self.memo.insert(place, top);
        }
        Ok(true)
    }

    /// Names, and what is made by them.
    fn object(&mut self, op: u8) -> Result<bool, Stop> {
        match op {
            op::GLOBAL => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Name::find(module, name))?;
            }
            op::STACK_GLOBAL => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (&Value::Text(module), &Value::Text(name)) = (self.value(module), self.value(name))
                else {
                    return Err("its pickle names something without text".into());
                };
                self.push(Name::find(module, name))?;
            }
            op::INST => {
                let (module, name) = (self.line()?, self.line()?);
                let arguments = self.pop_mark()?;
                self.push(Name::find(module, name))?;
                let class = self.pop()?;
                self.call(class, &arguments)?;
            }
            op::OBJ => {
                let items = self.pop_mark()?;
                let (&class, arguments) = items.split_first().ok_or(EMPTY)?;
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
                self.stored(id)?;
            }
            op::PERSID => {
                return Err(Stop::Refused("names what it holds in a way that PyTorch does not".into()));
            }
            op::EXT1..=op::EXT4 => {
                return Err(Stop::Refused("uses names that are registered in some program".into()));
            }
            op::NEXT_BUFFER | op::READONLY_BUFFER => {
                return Err(Stop::Refused("has parts outside the file (a pickle's buffers)".into()));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Gives the value on top its attributes.
    fn build(&mut self, state: Id) -> Result<(), Stop> {
        let top = self.top()?;
        let foreign = match &mut self.values[top.0 as usize] {
            Value::Other(other) => {
                other.state = Some(state);
                return Ok(());
            }
            // What an ordered dictionary has besides its entries (PyTorch's versions of modules), and a list of a class of
            // its own; of plain values nothing is kept.
            Value::Dict(_) | Value::List(_) | Value::Nothing => return Ok(()),
            Value::Tensor(_) | Value::Storage(_) => Other::foreign_tensor(),
            _ => return Err("its pickle gives attributes to what can have none".into()),
        };
        self.values[top.0 as usize] = Value::Other(foreign.into());
        Ok(())
    }

    /// Puts what is already there on the stack once more.
    pub fn push_again(&mut self, id: Id) {
        self.stack.push(id);
    }
}
