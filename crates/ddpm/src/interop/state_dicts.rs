//! Finds the state dicts in a file, and lists what else it holds.

use std::collections::{HashMap, HashSet};

use super::detect::is_signature;
use super::dtype::Dtype;
use super::pickle::{Foreign, Pickle, Value, ValueId};
use super::roles::is_averaged;

/// Maximum number of tensors in a state dict; large networks have about two thousand.
const MAX_TENSORS: usize = 5000;
/// Maximum length of a tensor name in bytes.
pub(super) const MAX_NAME: usize = 512;
/// Maximum nesting depth searched.
const MAX_DEPTH: usize = 8;
/// Maximum number of state dicts, and of those that match none of our networks.
const MAX_SETS: usize = 64;
const MAX_FOREIGN: usize = 4;
/// Maximum number of skipped entries reported by name.
const MAX_SKIPPED: usize = 64;
/// Number of list items searched: an optimizer's lists have thousands of values and no network.
const MAX_LIST_ITEMS: usize = 16;

const TOO_MANY: &str = "has too many nested dictionaries; save only the network's weights";

/// A tensor in a file.
#[derive(Clone, Debug)]
pub(super) struct TensorEntry {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: Dtype,
    pub at: TensorRef,
    /// Index of its file, for sharded weights.
    pub part: usize,
}

/// Locates a tensor in its file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum TensorRef {
    /// Index in the pickle.
    Value(ValueId),
    /// Name in a safetensors file.
    Name(String),
}

/// The tensors of one dictionary or list.
#[derive(Debug)]
pub(super) struct StateDict {
    /// Dotted keys that lead to it, such as `checkpoint.ema`; empty at the top level.
    pub key_path: String,
    /// In file order with unique names; the names of list items are their indices.
    pub tensors: Vec<TensorEntry>,
    /// Whether it is a list, whose tensors have no names.
    pub is_list: bool,
    /// Unsupported tensors, with reasons.
    pub unsupported: Vec<(String, &'static str)>,
}

/// The contents of a file.
#[derive(Debug, Default)]
pub(super) struct FileContents {
    pub sets: Vec<StateDict>,
    /// Skipped entries that need code outside the file, and what they are.
    pub skipped: Vec<(String, String)>,
    /// Number of further skipped entries.
    pub more: usize,
    /// Unsupported tensors, with descriptions.
    pub unsupported: Vec<(String, String)>,
}

/// Checks limits and removes duplicate names, keeping the last as Python does.
pub(super) fn checked(tensors: Vec<TensorEntry>) -> Result<Vec<TensorEntry>, String> {
    if tensors.len() > MAX_TENSORS {
        return Err(format!("has {} tensors in one dictionary; the limit is {MAX_TENSORS}", tensors.len()));
    }
    if let Some(long) = tensors.iter().find(|t| t.name.len() > MAX_NAME) {
        return Err(format!("has a tensor name of {} bytes; the limit is {MAX_NAME}", long.name.len()));
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

fn joined(key_path: &str, key: &str) -> String {
    let dot = if key_path.is_empty() || key.is_empty() { "" } else { "." };
    format!("{key_path}{dot}{key}")
}

/// Finds all state dicts in a pickle.
pub(super) fn find_state_dicts(pickle: &Pickle<'_>) -> Result<FileContents, String> {
    let mut walk = Walker { pickle, found: FileContents::default(), pending: Vec::new(), num_foreign: 0 };
    let mut seen = HashSet::new();
    walk.pending.push((pickle.root(), String::new(), 0));
    while let Some((id, key_path, depth)) = walk.pending.pop() {
        if !seen.insert(id) {
            continue;
        }
        let below = walk.visit(id, &key_path, depth)?;
        if walk.found.sets.len() > MAX_SETS || walk.pending.len() + below.len() > MAX_TENSORS {
            return Err(TOO_MANY.into());
        }
        // In file order.
        walk.pending.extend(below.into_iter().rev());
    }
    let mut found = walk.found;
    // Do not report objects that weights were found in, nor entries inside one already reported.
    let inside = |inner: &str, outer: &str| {
        outer.is_empty() || inner.strip_prefix(outer).is_some_and(|r| r.is_empty() || r.starts_with('.'))
    };
    let (sets, mut kept): (_, Vec<(String, String)>) = (&found.sets, Vec::new());
    for (key_path, what) in std::mem::take(&mut found.skipped) {
        if !sets.iter().any(|s| inside(&s.key_path, &key_path))
            && !kept.iter().any(|(k, _)| inside(&key_path, k))
        {
            kept.push((key_path, what));
        }
    }
    found.skipped = kept;
    Ok(found)
}

/// Values to visit, with their key paths and depths.
type Pending = Vec<(ValueId, String, usize)>;

struct Walker<'p, 'a> {
    pickle: &'p Pickle<'a>,
    found: FileContents,
    pending: Pending,
    /// Number of state dicts kept that match no network.
    num_foreign: usize,
}

impl Walker<'_, '_> {
    fn visit(&mut self, id: ValueId, key_path: &str, depth: usize) -> Result<Pending, String> {
        let pickle = self.pickle;
        match pickle.get(id) {
            Value::Dict(entries) => self.dictionary(entries, key_path, depth),
            Value::List(items) | Value::Tuple(items) => self.list(items, key_path, depth),
            Value::Foreign(foreign) => self.foreign(foreign, key_path, depth),
            _ => Ok(Vec::new()),
        }
    }

    fn tensor_entry(&self, id: ValueId, name: &str) -> Option<TensorEntry> {
        let Value::Tensor(tensor) = self.pickle.get(id) else { return None };
        let dtype = self.pickle.storage(tensor).map_or(Dtype::F32, |s| s.dtype);
        let (name, shape) = (name.to_owned(), tensor.shape.clone());
        Some(TensorEntry { name, shape, dtype, at: TensorRef::Value(id), part: 0 })
    }

    fn skip_object(&mut self, key_path: &str, foreign: &Foreign<'_>) {
        if self.found.skipped.len() < MAX_SKIPPED {
            self.found.skipped.push((key_path.to_owned(), foreign.name()));
        } else {
            self.found.more += 1;
        }
    }

    fn dictionary(
        &mut self,
        entries: &[(ValueId, ValueId)],
        key_path: &str,
        depth: usize,
    ) -> Result<Pending, String> {
        let pickle = self.pickle;
        let (mut tensors, mut unsupported, mut below): (Vec<TensorEntry>, Vec<_>, Pending) =
            Default::default();
        for &(key, value) in entries {
            let number = pickle.int(key).map(|n| n.to_string());
            let text = pickle.text(key);
            let key = text.or(number.as_deref()).filter(|k| k.len() <= MAX_NAME).unwrap_or("?");
            match (pickle.get(value), text) {
                (Value::Tensor(_), Some(name)) => {
                    if tensors.len() > MAX_TENSORS || name.len() > MAX_NAME {
                        return Err(format!(
                            "has more than {MAX_TENSORS} tensors in one dictionary, or a name of more than {MAX_NAME} bytes"
                        ));
                    }
                    tensors.extend(self.tensor_entry(value, name));
                }
                (Value::Foreign(foreign), Some(_)) if foreign.unsupported.is_some() => {
                    if unsupported.len() <= MAX_TENSORS {
                        unsupported.extend(foreign.unsupported.map(|t| (key.to_owned(), t.reason())));
                    }
                    if self.found.unsupported.len() < MAX_SKIPPED {
                        self.found.unsupported.extend(
                            foreign.unsupported.map(|t| (joined(key_path, key), t.kind().to_owned())),
                        );
                    }
                }
                (Value::Foreign(foreign), _) if !foreign.made || depth >= MAX_DEPTH => {
                    if self.found.skipped.len() < MAX_SKIPPED {
                        self.skip_object(&joined(key_path, key), foreign);
                    } else {
                        self.found.more += 1;
                    }
                }
                (Value::Dict(_) | Value::List(_) | Value::Tuple(_) | Value::Foreign(_), _)
                    if depth < MAX_DEPTH =>
                {
                    // Checked before building the path: a dictionary can hold millions of entries with a long path.
                    if below.len() >= MAX_TENSORS {
                        return Err(TOO_MANY.into());
                    }
                    below.push((value, joined(key_path, key), depth + 1));
                }
                _ => {}
            }
        }
        self.keep(StateDict { key_path: key_path.to_owned(), tensors, is_list: false, unsupported })?;
        Ok(below)
    }

    /// Keeps a state dict that may be imported, and a few others for messages: an optimizer has one for each parameter.
    fn keep(&mut self, mut set: StateDict) -> Result<(), String> {
        let is_network = set.tensors.iter().any(|t| is_signature(&t.name))
            || set.unsupported.iter().any(|t| is_signature(&t.0));
        if set.tensors.is_empty() && set.unsupported.is_empty() {
            return Ok(());
        }
        if !is_network && !is_averaged(&set.key_path) {
            if self.num_foreign >= MAX_FOREIGN {
                return Ok(());
            }
            self.num_foreign += 1;
        }
        set.tensors = checked(set.tensors)?;
        self.found.sets.push(set);
        Ok(())
    }

    fn list(&mut self, items: &[ValueId], key_path: &str, depth: usize) -> Result<Pending, String> {
        // Weights without names, as EMA classes store them.
        let tensors = |id: &&ValueId| matches!(self.pickle.get(**id), Value::Tensor(_));
        if items.len() > 1
            && items.len() <= MAX_TENSORS
            && items.iter().filter(tensors).count() == items.len()
        {
            let tensors = items
                .iter()
                .enumerate()
                .filter_map(|(i, &id)| self.tensor_entry(id, &i.to_string()))
                .collect();
            self.keep(StateDict {
                key_path: key_path.to_owned(),
                tensors,
                is_list: true,
                unsupported: Vec::new(),
            })?;
            return Ok(Vec::new());
        }
        let mut below = Vec::new();
        for (i, &value) in items.iter().take(MAX_LIST_ITEMS).enumerate() {
            match self.pickle.get(value) {
                Value::Foreign(foreign) if !foreign.made || depth >= MAX_DEPTH => {
                    self.skip_object(&joined(key_path, &i.to_string()), foreign);
                }
                Value::Dict(_) | Value::List(_) | Value::Tuple(_) | Value::Foreign(_)
                    if depth < MAX_DEPTH =>
                {
                    below.push((value, joined(key_path, &i.to_string()), depth + 1));
                }
                _ => {}
            }
        }
        Ok(below)
    }

    /// Visits an object that needs code outside the file: the items of a dict subclass, the tensors of a PyTorch module
    /// named as in `state_dict()`, the attributes of anything else.
    fn foreign(&mut self, foreign: &Foreign<'_>, key_path: &str, depth: usize) -> Result<Pending, String> {
        if !foreign.entries.is_empty() {
            return self.dictionary(&foreign.entries, key_path, depth);
        }
        self.skip_object(key_path, foreign);
        let Some(state) = foreign.state else { return Ok(Vec::new()) };
        if self.pickle.entry(state, "_modules").is_some() {
            let set = self.module(state, key_path)?;
            self.keep(set)?;
            return Ok(Vec::new());
        }
        match self.pickle.get(state) {
            Value::Dict(_) if depth < MAX_DEPTH => Ok(vec![(state, key_path.to_owned(), depth + 1)]),
            _ => Ok(Vec::new()),
        }
    }

    /// The state dict of a pickled module with the attributes `state`.
    fn module(&self, state: ValueId, key_path: &str) -> Result<StateDict, String> {
        let pickle = self.pickle;
        let (mut tensors, mut unsupported) = (Vec::new(), Vec::new());
        let (mut pending, mut steps) = (vec![(state, String::new())], 0usize);
        while let Some((state, prefix)) = pending.pop() {
            let entries =
                |key: &str| pickle.entry(state, key).and_then(|id| pickle.dict(id)).unwrap_or_default();
            let hidden = match pickle.entry(state, "_non_persistent_buffers_set").map(|id| pickle.get(id)) {
                Some(Value::List(names)) => &names[..names.len().min(MAX_LIST_ITEMS)],
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
                    Value::Foreign(foreign) => {
                        unsupported.extend(foreign.unsupported.map(|t| (name, t.reason())))
                    }
                    _ => tensors.extend(self.tensor_entry(value, &name)),
                }
            }
            for &(key, value) in entries("_modules").iter().rev() {
                steps += 1;
                let Value::Foreign(child) = pickle.get(value) else { continue };
                let (Some(key), Some(state)) = (pickle.text(key), child.state) else { continue };
                if prefix.len() + key.len() > MAX_NAME || steps > MAX_TENSORS {
                    return Err(TOO_MANY.into());
                }
                pending.push((state, format!("{prefix}{key}.")));
            }
        }
        Ok(StateDict { key_path: key_path.to_owned(), tensors, is_list: false, unsupported })
    }
}
