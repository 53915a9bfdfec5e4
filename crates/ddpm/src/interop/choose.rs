//! Finds which of a file's state dicts are weights of our networks, and chooses one.

use std::collections::{HashMap, HashSet};

use super::detect::{SIGNATURES, is_buffer, is_plausible};
use super::roles::{Role, is_averaged, role};
use super::state_dicts::{FileContents, StateDict, TensorEntry};
use crate::nets::NetworkKind;

/// Maximum number of sets of weights in a file.
const MAX_CANDIDATES: usize = 32;

/// Weights of one of our networks in a file.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    /// Its name for `--key`: the keys that lead to it and the common prefix of its names; empty for the whole file.
    pub key: String,
    pub kind: NetworkKind,
    pub role: Role,
    /// Its tensors, named as in the network.
    pub tensors: Vec<TensorEntry>,
    /// Its unsupported tensors, with reasons.
    pub unsupported: Vec<(String, &'static str)>,
    /// The tensor that counts EMA updates, or says whether there was any.
    pub counter: Option<TensorEntry>,
    /// Key path of its dictionary, and the prefix of its names there.
    key_path: String,
    prefix: String,
}

fn joined(key_path: &str, prefix: &str) -> String {
    let keys = [key_path, prefix.trim_end_matches('.')];
    keys.into_iter().filter(|k| !k.is_empty()).collect::<Vec<_>>().join(".")
}

/// All weights of our networks in a file; the error is the reason without a path.
pub(super) fn candidates(found: &FileContents) -> Result<Vec<Candidate>, String> {
    let mut all: Vec<Candidate> = Vec::new();
    for set in found.sets.iter().filter(|s| !s.is_list) {
        all.extend(candidates_in(set)?);
        if all.len() > MAX_CANDIDATES {
            return Err(format!(
                "has more than {MAX_CANDIDATES} sets of weights; save only the one to import"
            ));
        }
    }
    if all.len() > 1 && all.iter().any(is_plausible) {
        all.retain(is_plausible);
    }
    let mut nameless = Vec::new();
    for candidate in &all {
        let set = found.sets.iter().find(|s| s.key_path == candidate.key_path && !s.is_list);
        nameless.extend(set.and_then(|set| dotless_averages(candidate, set)));
        let lists = found.sets.iter().filter(|s| s.is_list && !s.key_path.is_empty());
        nameless.extend(lists.filter_map(|list| unnamed_averages(candidate, list)));
    }
    for candidate in nameless.into_iter().take(MAX_CANDIDATES) {
        if !all.iter().any(|c| c.key == candidate.key) {
            all.push(candidate);
        }
    }
    let keys: Vec<String> = all.iter().map(|c| c.key.clone()).collect();
    for candidate in &mut all {
        candidate.role = role(&candidate.key, &keys);
        // PyTorch's AveragedModel, under any key.
        if candidate.counter.as_ref().is_some_and(|c| c.name.ends_with("n_averaged"))
            && candidate.role == Role::Plain
        {
            candidate.role = Role::Averaged;
        }
    }
    let averages = all.iter().any(|c| c.role == Role::Averaged);
    for candidate in all.iter_mut().filter(|c| averages && c.role == Role::Plain && c.counter.is_none()) {
        candidate.role = Role::Raw;
    }
    Ok(all)
}

/// The candidates in a dictionary: one for each occurrence of a network's signature tensor.
fn candidates_in(set: &StateDict) -> Result<Vec<Candidate>, String> {
    let names = set.tensors.iter().map(|t| &t.name).chain(set.unsupported.iter().map(|u| &u.0));
    let mut prefixes: Vec<(&str, NetworkKind)> = Vec::new();
    for name in names {
        for (kind, signature) in SIGNATURES {
            let prefix = name.strip_suffix(signature).filter(|p| p.is_empty() || p.ends_with('.'));
            prefixes.extend(prefix.map(|p| (p, kind)));
        }
        if prefixes.len() > MAX_CANDIDATES {
            return Err(format!(
                "has more than {MAX_CANDIDATES} sets of weights; save only the one to import"
            ));
        }
    }
    let one = |&(prefix, kind): &(&str, NetworkKind)| {
        // Networks nested under this prefix, such as averages that a module keeps of itself.
        let inner: Vec<&str> = prefixes
            .iter()
            .map(|p| p.0)
            .filter(|p| p.len() > prefix.len() && p.starts_with(prefix))
            .collect();
        let own = |name: &str| name.starts_with(prefix) && !inner.iter().any(|p| name.starts_with(p));
        let counters = counters(prefix);
        let counter = counters.iter().find_map(|name| set.tensors.iter().find(|t| t.name == *name)).cloned();
        let mut tensors: Vec<TensorEntry> = set.tensors.iter().filter(|t| own(&t.name)).cloned().collect();
        tensors.iter_mut().for_each(|t| drop(t.name.drain(..prefix.len())));
        // EMA counters stored among the weights.
        tensors.retain(|t| !(t.shape.is_empty() && COUNTERS.contains(&t.name.as_str())));
        let unsupported = set.unsupported.iter().filter(|u| own(&u.0));
        Candidate {
            key: joined(&set.key_path, prefix),
            kind,
            role: Role::Plain,
            tensors,
            unsupported: unsupported.map(|(name, why)| (name[prefix.len()..].to_owned(), *why)).collect(),
            counter,
            key_path: set.key_path.clone(),
            prefix: prefix.to_owned(),
        }
    };
    Ok(prefixes.iter().map(one).collect())
}

/// Bookkeeping tensors of EMA classes: PyTorch's AveragedModel, ema-pytorch, LitEma.
const COUNTERS: [&str; 5] = ["n_averaged", "initted", "step", "decay", "num_updates"];

/// The names that an EMA counter for this prefix could have: next to `module.` for PyTorch, next to the network for others.
fn counters(prefix: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut rest = prefix.trim_end_matches('.');
    while !rest.is_empty() && names.len() < 16 {
        let (outer, last) = rest.rsplit_once('.').map_or(("", rest), |(outer, last)| (outer, last));
        let dot = if outer.is_empty() { "" } else { "." };
        if last == "module" {
            names.push(format!("{outer}{dot}n_averaged"));
        }
        if is_averaged(last) {
            names.push(format!("{outer}{dot}initted"));
        }
        rest = outer;
    }
    names
}

/// Averages of `of` in the same dictionary whose names have no dots (LitEma of latent-diffusion).
fn dotless_averages(of: &Candidate, set: &StateDict) -> Option<Candidate> {
    let places: HashMap<&str, &TensorEntry> = set.tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    let parameters: Vec<&TensorEntry> = of.tensors.iter().filter(|t| !is_buffer(&t.name)).collect();
    let first = parameters.first()?;
    let flat = |prefix: &str, name: &str| format!("{prefix}{name}").replace('.', "");
    // The original names may start at any component of the prefix.
    let mut begin = of.prefix.as_str();
    loop {
        let end = flat(begin, &first.name);
        for head in set.tensors.iter().filter_map(|t| t.name.strip_suffix(&end)).filter(|h| h.ends_with('.'))
        {
            let twin = |t: &&TensorEntry| {
                let found = places.get(format!("{head}{}", flat(begin, &t.name)).as_str())?;
                (found.shape == t.shape).then(|| TensorEntry { name: t.name.clone(), ..(*found).clone() })
            };
            if let Some(tensors) = parameters.iter().map(twin).collect::<Option<Vec<_>>>() {
                return Some(of.with(joined(&of.key_path, head), tensors));
            }
        }
        begin = begin.split_once('.')?.1;
    }
}

/// Averages of `of` in a list that matches its parameters' shapes in order (diffusers' EMAModel, torch_ema).
fn unnamed_averages(of: &Candidate, list: &StateDict) -> Option<Candidate> {
    let parameters: Vec<&TensorEntry> = of.tensors.iter().filter(|t| !is_buffer(&t.name)).collect();
    let fits = parameters.len() == list.tensors.len()
        && parameters.iter().zip(&list.tensors).all(|(a, b)| a.shape == b.shape);
    let named =
        parameters.iter().zip(&list.tensors).map(|(t, l)| TensorEntry { name: t.name.clone(), ..l.clone() });
    fits.then(|| of.with(list.key_path.clone(), named.collect()))
}

impl Candidate {
    /// Whether both refer to the same tensors in the file.
    fn is_same(&self, other: &Self) -> bool {
        self.tensors.len() == other.tensors.len()
            && self.tensors.iter().zip(&other.tensors).all(|(a, b)| a.at == b.at && a.name == b.name)
    }

    /// A candidate with these parameters under another key, and the buffers of `self`, which are never averaged.
    fn with(&self, key: String, parameters: Vec<TensorEntry>) -> Self {
        let buffers = self.tensors.iter().filter(|t| is_buffer(&t.name)).cloned();
        let tensors = parameters.into_iter().chain(buffers).collect();
        let (unsupported, counter) = (Vec::new(), None);
        Self { key, tensors, unsupported, counter, role: Role::Plain, ..self.clone() }
    }
}

/// Keys with their roles, for messages.
pub(super) fn list_candidates<'c>(all: impl IntoIterator<Item = &'c Candidate>) -> String {
    let one = |c: &Candidate| match c.key.as_str() {
        "" => format!("\"\" (top level; {})", c.role.name()),
        key => format!("{key:?} ({})", c.role.name()),
    };
    all.into_iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Chooses the candidate with the given key, else the only averaged one, else the only one. The error is the reason
/// without a path.
pub(super) fn choose<'c>(
    all: &'c [Candidate],
    found: &FileContents,
    key: Option<&str>,
) -> Result<&'c Candidate, String> {
    const ASK: &str = "choose one with ddpm import FILE --key NAME";
    let of: Vec<&Candidate> = match key {
        None => all.iter().collect(),
        Some(key) => {
            if let Some(exact) = all.iter().find(|c| c.key == key) {
                return Ok(exact);
            }
            let below = |c: &&Candidate| {
                c.key.strip_prefix(key).is_some_and(|rest| rest.starts_with('.') && !key.is_empty())
            };
            all.iter().filter(below).collect()
        }
    };
    let one_of = |role: &[Role]| of.iter().copied().filter(|c| role.contains(&c.role)).collect::<Vec<_>>();
    let ambiguous = |sets: &[&'c Candidate], why: &str| {
        // The same tensors under several keys are not ambiguous.
        if sets.iter().all(|c| c.is_same(sets[0])) {
            return Ok(sets[0]);
        }
        Err(format!(
            "has several sets of weights, and {why}: {}; {ASK}",
            list_candidates(sets.iter().copied())
        ))
    };
    let averaged = one_of(&[Role::Averaged]);
    match (&averaged[..], key) {
        ([one], _) => return Ok(one),
        ([], Some(key)) if of.is_empty() => {
            return Err(if all.is_empty() {
                "has no weights of our networks".to_owned()
            } else {
                format!("has no weights named {key:?}; --key can be one of {}", list_candidates(all))
            });
        }
        ([], _) => {}
        (several, _) => return ambiguous(several, "more than one is averaged"),
    }
    let unsupported = if key.is_none() { unreadable_averages(all, found) } else { Vec::new() };
    let (raw, rest) = (one_of(&[Role::Plain, Role::Raw]), one_of(&[Role::Optimizer]));
    match (&raw[..], &unsupported[..]) {
        ([one], []) => Ok(one),
        ([], _) => {
            if rest.is_empty() {
                Err(no_weights_reason(found))
            } else {
                Err(format!(
                    "has no weights except optimizer state: {}; {ASK}",
                    list_candidates(rest.iter().copied())
                ))
            }
        }
        (_, [first, ..]) => Err(format!(
            "has averaged weights ({first}) in an unsupported format; the others are {}: {ASK}, or save only the averaged \
             ones",
            list_candidates(raw.iter().copied())
        )),
        (several, []) => ambiguous(several, "the choice is ambiguous"),
    }
}

/// Key paths that indicate averaged weights in which no network was found.
fn unreadable_averages(all: &[Candidate], found: &FileContents) -> Vec<String> {
    let is_weights = |t: &TensorEntry| t.shape.iter().product::<usize>() > 1;
    let used: HashSet<_> = all.iter().flat_map(|c| &c.tensors).map(|t| (&t.at, t.part)).collect();
    let mut places = Vec::new();
    for set in &found.sets {
        let here = is_averaged(&set.key_path);
        let left = set.tensors.iter().filter(|t| is_weights(t) && !used.contains(&(&t.at, t.part)));
        let first = left.filter(|t| here || (!set.is_list && is_averaged(&t.name))).map(|t| &t.name);
        places.extend(
            first.take(1).map(|name| if here { set.key_path.clone() } else { joined(&set.key_path, name) }),
        );
    }
    places
}

/// The error for a file without weights of our networks.
fn no_weights_reason(found: &FileContents) -> String {
    let shown = |t: &TensorEntry| t.name.chars().filter(|c| !c.is_control()).take(100).collect::<String>();
    let names: Vec<String> =
        found.sets.iter().filter(|s| !s.is_list).flat_map(|s| &s.tensors).map(shown).take(3).collect();
    let list = found.sets.iter().find(|s| s.is_list);
    let there = match (&names[..], list) {
        ([], Some(list)) => format!(
            "it has a list of {} unnamed tensors ({}), as EMA classes store them; give a file that also has the network's \
             state_dict()",
            list.tensors.len(),
            if list.key_path.is_empty() { "the whole file" } else { &list.key_path }
        ),
        ([], None) => "it has no tensors".to_owned(),
        _ => format!("it has tensors such as {}", names.join(", ")),
    };
    let unsupported = found.sets.iter().find_map(|s| s.unsupported.first());
    let unsupported = unsupported.map_or(String::new(), |(name, why)| format!("; tensor {name} is {why}"));
    let left = match &found.skipped[..] {
        [] => String::new(),
        left => format!(
            "; objects that need code outside the file were skipped, as ddpm never executes any: {}. If they hold the \
             weights, save only those in PyTorch: torch.save(model.state_dict(), FILE)",
            describe_skipped(left, found.more)
        ),
    };
    format!(
        "matches none of the networks attention, simple, double-conv and unet2d (diffusers' UNet2DModel): {there}{unsupported}{left}"
    )
}

/// Lists skipped entries and what they are.
pub(super) fn describe_skipped(left: &[(String, String)], more: usize) -> String {
    const SHOWN: usize = 12;
    let clean = |text: &str| text.chars().filter(|c| !c.is_control()).take(100).collect::<String>();
    let one = |(key_path, what): &(String, String)| match key_path.as_str() {
        "" => format!("the whole file ({what})"),
        key_path => format!("{} ({what})", clean(key_path)),
    };
    let shown: Vec<_> = left.iter().take(SHOWN).map(one).collect();
    let more = more + left.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", shown.join(", "))
}
