//! Which sets of tensors a file has, and what else.

use std::collections::{HashMap, HashSet};

use super::dtype::Dtype;
use super::pickle::{Id, Other, Pickle, Value};
use super::recognise::is_mark;
use super::roles::is_averaged;

/// Most tensors in a set; large networks have two thousand.
const MAX_TENSORS: usize = 5000;
/// Longest name of a tensor, in bytes.
pub(super) const MAX_NAME: usize = 512;
/// Most dictionaries inside one another that are looked into.
const MAX_DEPTH: usize = 8;
/// Most sets with weights of our networks, and sets of other tensors that are kept.
const MAX_SETS: usize = 64;
const FOREIGN: usize = 4;
/// Most entries that are named as left out.
const MAX_LEFT_OUT: usize = 64;
/// Items of a list that are looked into: an optimiser's lists have thousands of values and nothing of a network.
const ITEMS: usize = 16;

const TOO_MANY: &str = "has too many dictionaries inside one another; save the network's weights alone";

/// A tensor that a file has.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: Dtype,
    pub at: At,
    /// Which of several files has it.
    pub part: usize,
}

/// Where a tensor is in its file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum At {
    /// In the pickle.
    Value(Id),
    /// Under this name, in a safetensors file.
    Name(String),
}

/// Tensors of one dictionary.
#[derive(Debug)]
pub(super) struct Set {
    /// The keys on the way to it, as `checkpoint.ema`; empty at the top.
    pub place: String,
    /// In the order of the file, each name once; of a list the names are the places.
    pub tensors: Vec<Listed>,
    /// Whether it is a list, which has no names.
    pub is_list: bool,
    /// Tensors that are not read, and why.
    pub unread: Vec<(String, &'static str)>,
}

/// What a file has.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub sets: Vec<Set>,
    /// Entries that only code outside the file could make, and what they are.
    pub left_out: Vec<(String, String)>,
    /// How many more of these there are.
    pub more: usize,
    /// Tensors that are not read, and of which kind they are.
    pub unread: Vec<(String, String)>,
}

/// Refuses sets that no network has; of equal names the last stays, as in Python.
pub(super) fn checked(tensors: Vec<Listed>) -> Result<Vec<Listed>, String> {
    if tensors.len() > MAX_TENSORS {
        return Err(format!("has {} tensors in one place; at most {MAX_TENSORS} are read", tensors.len()));
    }
    if let Some(long) = tensors.iter().find(|t| t.name.len() > MAX_NAME) {
        return Err(format!(
            "has a tensor with a name of {} bytes; at most {MAX_NAME} are read",
            long.name.len()
        ));
    }
    let last: HashMap<&str, usize> = tensors.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
    let keep: HashSet<usize> = last.into_values().collect();
    let mut i = 0;
    let mut tensors = tensors;
    tensors.retain(|_| {
        i += 1;
        keep.contains(&(i - 1))
    });
    Ok(tensors)
}

fn joined(place: &str, key: &str) -> String {
    let dot = if place.is_empty() || key.is_empty() { "" } else { "." };
    format!("{place}{dot}{key}")
}

/// All sets of tensors of a pickle.
pub(super) fn sets_of(pickle: &Pickle<'_>) -> Result<Found, String> {
    let mut walk = Walk { pickle, found: Found::default(), left: Vec::new(), foreign: 0 };
    let mut seen = HashSet::new();
    walk.left.push((pickle.root(), String::new(), 0));
    while let Some((id, place, depth)) = walk.left.pop() {
        if !seen.insert(id) {
            continue;
        }
        let below = walk.visit(id, &place, depth)?;
        if walk.found.sets.len() > MAX_SETS || walk.left.len() + below.len() > MAX_TENSORS {
            return Err(TOO_MANY.into());
        }
        // In the order of the file.
        walk.left.extend(below.into_iter().rev());
    }
    let mut found = walk.found;
    // What weights were found in is not left out, and what is inside of something that is is not told again.
    let inside = |inner: &str, outer: &str| {
        outer.is_empty() || inner.strip_prefix(outer).is_some_and(|r| r.is_empty() || r.starts_with('.'))
    };
    let (sets, mut kept): (_, Vec<(String, String)>) = (&found.sets, Vec::new());
    for (place, what) in std::mem::take(&mut found.left_out) {
        if !sets.iter().any(|s| inside(&s.place, &place)) && !kept.iter().any(|(k, _)| inside(&place, k)) {
            kept.push((place, what));
        }
    }
    found.left_out = kept;
    Ok(found)
}

/// A value to look into, its place, and how deep it is.
type Below = Vec<(Id, String, usize)>;

struct Walk<'p, 'a> {
    pickle: &'p Pickle<'a>,
    found: Found,
    left: Below,
    /// Sets of other tensors that were kept.
    foreign: usize,
}

impl Walk<'_, '_> {
    fn visit(&mut self, id: Id, place: &str, depth: usize) -> Result<Below, String> {
        let pickle = self.pickle;
        match pickle.get(id) {
            Value::Dict(entries) => self.dictionary(entries, place, depth),
            Value::List(items) | Value::Tuple(items) => self.list(items, place, depth),
            Value::Other(other) => self.other(other, place, depth),
            _ => Ok(Vec::new()),
        }
    }

    fn listed(&self, id: Id, name: &str) -> Option<Listed> {
        let Value::Tensor(tensor) = self.pickle.get(id) else { return None };
        let dtype = self.pickle.storage(tensor).map_or(Dtype::F32, |s| s.dtype);
        let (name, shape) = (name.to_owned(), tensor.shape.clone());
        Some(Listed { name, shape, dtype, at: At::Value(id), part: 0 })
    }

    fn leave_out(&mut self, place: &str, other: &Other<'_>) {
        if self.found.left_out.len() < MAX_LEFT_OUT {
            self.found.left_out.push((place.to_owned(), other.name()));
        } else {
            self.found.more += 1;
        }
    }

    fn dictionary(&mut self, entries: &[(Id, Id)], place: &str, depth: usize) -> Result<Below, String> {
        let pickle = self.pickle;
        let (mut tensors, mut unread, mut below): (Vec<Listed>, Vec<_>, Below) = Default::default();
        for &(key, value) in entries {
            let number = pickle.int(key).map(|n| n.to_string());
            let text = pickle.text(key);
            let key = text.or(number.as_deref()).filter(|k| k.len() <= MAX_NAME).unwrap_or("?");
            match (pickle.get(value), text) {
                (Value::Tensor(_), Some(name)) => {
                    if tensors.len() > MAX_TENSORS || name.len() > MAX_NAME {
                        return Err(format!(
                            "has more than {MAX_TENSORS} tensors in one place, or a name of more than {MAX_NAME} bytes"
                        ));
                    }
                    tensors.extend(self.listed(value, name));
                }
                (Value::Other(other), Some(_)) if other.trouble.is_some() => {
                    if unread.len() <= MAX_TENSORS {
                        unread.extend(other.trouble.map(|t| (key.to_owned(), t.reason())));
                    }
                    if self.found.unread.len() < MAX_LEFT_OUT {
                        self.found
                            .unread
                            .extend(other.trouble.map(|t| (joined(place, key), t.kind().to_owned())));
                    }
                }
                (Value::Other(other), _) if !other.made || depth >= MAX_DEPTH => {
                    if self.found.left_out.len() < MAX_LEFT_OUT {
                        self.leave_out(&joined(place, key), other);
                    } else {
                        self.found.more += 1;
                    }
                }
                (Value::Dict(_) | Value::List(_) | Value::Tuple(_) | Value::Other(_), _)
                    if depth < MAX_DEPTH =>
                {
                    // Before its place is written down: a dictionary may have millions of them under one long name.
                    if below.len() >= MAX_TENSORS {
                        return Err(TOO_MANY.into());
                    }
                    below.push((value, joined(place, key), depth + 1));
                }
                _ => {}
            }
        }
        self.keep(Set { place: place.to_owned(), tensors, is_list: false, unread })?;
        Ok(below)
    }

    /// Keeps a set that may be wanted, and a few others for messages: an optimiser has one for each tensor of the network.
    fn keep(&mut self, mut set: Set) -> Result<(), String> {
        let marked = set.tensors.iter().any(|t| is_mark(&t.name)) || set.unread.iter().any(|t| is_mark(&t.0));
        if set.tensors.is_empty() && set.unread.is_empty() {
            return Ok(());
        }
        if !marked && !is_averaged(&set.place) {
            if self.foreign >= FOREIGN {
                return Ok(());
            }
            self.foreign += 1;
        }
        set.tensors = checked(set.tensors)?;
        self.found.sets.push(set);
        Ok(())
    }

    fn list(&mut self, items: &[Id], place: &str, depth: usize) -> Result<Below, String> {
        // The weights without their names, as averages keep them.
        let tensors = |id: &&Id| matches!(self.pickle.get(**id), Value::Tensor(_));
        if items.len() > 1
            && items.len() <= MAX_TENSORS
            && items.iter().filter(tensors).count() == items.len()
        {
            let tensors =
                items.iter().enumerate().filter_map(|(i, &id)| self.listed(id, &i.to_string())).collect();
            self.keep(Set { place: place.to_owned(), tensors, is_list: true, unread: Vec::new() })?;
            return Ok(Vec::new());
        }
        let mut below = Vec::new();
        for (i, &value) in items.iter().take(ITEMS).enumerate() {
            match self.pickle.get(value) {
                Value::Other(other) if !other.made || depth >= MAX_DEPTH => {
                    self.leave_out(&joined(place, &i.to_string()), other);
                }
                Value::Dict(_) | Value::List(_) | Value::Tuple(_) | Value::Other(_) if depth < MAX_DEPTH => {
                    below.push((value, joined(place, &i.to_string()), depth + 1));
                }
                _ => {}
            }
        }
        Ok(below)
    }

    /// Something that only code outside the file could make; of a class of dictionaries the entries are looked into, of a
    /// module of PyTorch's the tensors are taken as `state_dict()` names them, of anything else the attributes are looked into.
    fn other(&mut self, other: &Other<'_>, place: &str, depth: usize) -> Result<Below, String> {
        if !other.entries.is_empty() {
            return self.dictionary(&other.entries, place, depth);
        }
        self.leave_out(place, other);
        let Some(state) = other.state else { return Ok(Vec::new()) };
        if self.pickle.entry(state, "_modules").is_some() {
            let set = self.module(state, place)?;
            self.keep(set)?;
            return Ok(Vec::new());
        }
        match self.pickle.get(state) {
            Value::Dict(_) if depth < MAX_DEPTH => Ok(vec![(state, place.to_owned(), depth + 1)]),
            _ => Ok(Vec::new()),
        }
    }

    /// The tensors of a whole module, whose attributes are `state`.
    fn module(&self, state: Id, place: &str) -> Result<Set, String> {
        let pickle = self.pickle;
        let (mut tensors, mut unread) = (Vec::new(), Vec::new());
        let (mut left, mut steps) = (vec![(state, String::new())], 0usize);
        while let Some((state, prefix)) = left.pop() {
            let entries =
                |key: &str| pickle.entry(state, key).and_then(|id| pickle.dict(id)).unwrap_or_default();
            let hidden = match pickle.entry(state, "_non_persistent_buffers_set").map(|id| pickle.get(id)) {
                Some(Value::List(names)) => &names[..names.len().min(ITEMS)],
                _ => &[],
            };
            let hides = |name: &str| hidden.iter().any(|&id| pickle.text(id) == Some(name));
            for &(key, value) in entries("_parameters").iter().chain(entries("_buffers")) {
                steps += 1;
                let Some(key) = pickle.text(key).filter(|key| !hides(key)) else { continue };
                if prefix.len() + key.len() > MAX_NAME || steps > MAX_TENSORS {
                    return Err(TOO_MANY.into());
                }
                let name = format!("{prefix}{key}");
                match pickle.get(value) {
                    Value::Other(other) => unread.extend(other.trouble.map(|t| (name, t.reason()))),
                    _ => tensors.extend(self.listed(value, &name)),
                }
            }
            for &(key, value) in entries("_modules").iter().rev() {
                steps += 1;
                let Value::Other(child) = pickle.get(value) else { continue };
                let (Some(key), Some(state)) = (pickle.text(key), child.state) else { continue };
                if prefix.len() + key.len() > MAX_NAME || steps > MAX_TENSORS {
                    return Err(TOO_MANY.into());
                }
                left.push((state, format!("{prefix}{key}.")));
            }
        }
        Ok(Set { place: place.to_owned(), tensors, is_list: false, unread })
    }
}
