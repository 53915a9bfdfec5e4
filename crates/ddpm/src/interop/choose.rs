//! Which of a file's sets of tensors are weights of our networks, and which of them is meant.

use std::collections::{HashMap, HashSet};

use super::recognise::{SIGNATURES, is_buffer, is_plausible};
use super::roles::{Role, is_averaged, role};
use super::sets::{Found, Listed, Set};
use crate::train::config::NetworkKind;

/// Most sets of weights in a file.
const MOST: usize = 32;

/// Weights of one of our networks in a file.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    /// How `--key` calls it: the keys on the way to it, and what all its names begin with; empty for the whole file.
    pub key: String,
    pub kind: NetworkKind,
    pub role: Role,
    /// Its tensors, by the network's own names.
    pub tensors: Vec<Listed>,
    /// Tensors of it that are not read, and why.
    pub unread: Vec<(String, &'static str)>,
    /// What counts the averages that were taken, or says whether any was.
    pub counter: Option<Listed>,
    /// The place of its dictionary, and what its names begin with there.
    place: String,
    prefix: String,
}

fn joined(place: &str, prefix: &str) -> String {
    let keys = [place, prefix.trim_end_matches('.')];
    keys.into_iter().filter(|k| !k.is_empty()).collect::<Vec<_>>().join(".")
}

/// All weights of our networks in a file's sets; the error is the reason alone.
pub(super) fn candidates(found: &Found) -> Result<Vec<Candidate>, String> {
    let mut all: Vec<Candidate> = Vec::new();
    for set in found.sets.iter().filter(|s| !s.is_list) {
        all.extend(named(set)?);
        if all.len() > MOST {
            return Err(format!("has more than {MOST} sets of weights; save the one that is meant alone"));
        }
    }
    if all.len() > 1 && all.iter().any(is_plausible) {
        all.retain(is_plausible);
    }
    let mut nameless = Vec::new();
    for candidate in &all {
        let set = found.sets.iter().find(|s| s.place == candidate.place && !s.is_list);
        nameless.extend(set.and_then(|set| without_dots(candidate, set)));
        let lists = found.sets.iter().filter(|s| s.is_list && !s.place.is_empty());
        nameless.extend(lists.filter_map(|list| without_names(candidate, list)));
    }
    for candidate in nameless.into_iter().take(MOST) {
        if !all.iter().any(|c| c.key == candidate.key) {
            all.push(candidate);
        }
    }
    let keys: Vec<String> = all.iter().map(|c| c.key.clone()).collect();
    for candidate in &mut all {
        candidate.role = role(&candidate.key, &keys);
        // As PyTorch's AveragedModel, under whatever key.
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

/// Those of a dictionary: one for each place where a network's mark is.
fn named(set: &Set) -> Result<Vec<Candidate>, String> {
    let names = set.tensors.iter().map(|t| &t.name).chain(set.unread.iter().map(|u| &u.0));
    let mut prefixes: Vec<(&str, NetworkKind)> = Vec::new();
    for name in names {
        for (kind, mark) in SIGNATURES {
            let prefix = name.strip_suffix(mark).filter(|p| p.is_empty() || p.ends_with('.'));
            prefixes.extend(prefix.map(|p| (p, kind)));
        }
        if prefixes.len() > MOST {
            return Err(format!("has more than {MOST} sets of weights; save the one that is meant alone"));
        }
    }
    let one = |&(prefix, kind): &(&str, NetworkKind)| {
        // A network inside of this one's names, as averages that a module keeps of itself.
        let inner: Vec<&str> = prefixes
            .iter()
            .map(|p| p.0)
            .filter(|p| p.len() > prefix.len() && p.starts_with(prefix))
            .collect();
        let own = |name: &str| name.starts_with(prefix) && !inner.iter().any(|p| name.starts_with(p));
        let counters = counters(prefix);
        let counter = counters.iter().find_map(|name| set.tensors.iter().find(|t| t.name == *name)).cloned();
        let mut tensors: Vec<Listed> = set.tensors.iter().filter(|t| own(&t.name)).cloned().collect();
        tensors.iter_mut().for_each(|t| drop(t.name.drain(..prefix.len())));
        // Beside the weights in one dictionary, as averages note them.
        tensors.retain(|t| !(t.shape.is_empty() && COUNTERS.contains(&t.name.as_str())));
        let unread = set.unread.iter().filter(|u| own(&u.0));
        Candidate {
            key: joined(&set.place, prefix),
            kind,
            role: Role::Plain,
            tensors,
            unread: unread.map(|(name, why)| (name[prefix.len()..].to_owned(), *why)).collect(),
            counter,
            place: set.place.clone(),
            prefix: prefix.to_owned(),
        }
    };
    Ok(prefixes.iter().map(one).collect())
}

/// What averages note of themselves: PyTorch's AveragedModel, ema-pytorch, LitEma.
const COUNTERS: [&str; 5] = ["n_averaged", "initted", "step", "decay", "num_updates"];

/// The names under which averages of these names' beginning would count themselves: PyTorch's beside `module.`, others' beside
/// the network.
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

/// Averages of `of` in the same dictionary, whose names have lost their points (LitEma of latent-diffusion).
fn without_dots(of: &Candidate, set: &Set) -> Option<Candidate> {
    let places: HashMap<&str, &Listed> = set.tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    let parameters: Vec<&Listed> = of.tensors.iter().filter(|t| !is_buffer(&t.name)).collect();
    let first = parameters.first()?;
    let flat = |prefix: &str, name: &str| format!("{prefix}{name}").replace('.', "");
    // Its names began at any of the keys before them.
    let mut begin = of.prefix.as_str();
    loop {
        let end = flat(begin, &first.name);
        for head in set.tensors.iter().filter_map(|t| t.name.strip_suffix(&end)).filter(|h| h.ends_with('.'))
        {
            let twin = |t: &&Listed| {
                let found = places.get(format!("{head}{}", flat(begin, &t.name)).as_str())?;
                (found.shape == t.shape).then(|| Listed { name: t.name.clone(), ..(*found).clone() })
            };
            if let Some(tensors) = parameters.iter().map(twin).collect::<Option<Vec<_>>>() {
                return Some(of.with(joined(&of.place, head), tensors));
            }
        }
        begin = begin.split_once('.')?.1;
    }
}

/// Averages of `of` in a list, which has its parameters' shapes in their order (diffusers' EMAModel, torch_ema).
fn without_names(of: &Candidate, list: &Set) -> Option<Candidate> {
    let parameters: Vec<&Listed> = of.tensors.iter().filter(|t| !is_buffer(&t.name)).collect();
    let fits = parameters.len() == list.tensors.len()
        && parameters.iter().zip(&list.tensors).all(|(a, b)| a.shape == b.shape);
    let named =
        parameters.iter().zip(&list.tensors).map(|(t, l)| Listed { name: t.name.clone(), ..l.clone() });
    fits.then(|| of.with(list.place.clone(), named.collect()))
}

impl Candidate {
    /// Whether both are of the same tensors of the file.
    fn is_same(&self, other: &Self) -> bool {
        self.tensors.len() == other.tensors.len()
            && self.tensors.iter().zip(&other.tensors).all(|(a, b)| a.at == b.at && a.name == b.name)
    }

    /// These parameters under another key, with the buffers of `self`, which nobody averages.
    fn with(&self, key: String, parameters: Vec<Listed>) -> Self {
        let buffers = self.tensors.iter().filter(|t| is_buffer(&t.name)).cloned();
        let tensors = parameters.into_iter().chain(buffers).collect();
        let (unread, counter) = (Vec::new(), None);
        Self { key, tensors, unread, counter, role: Role::Plain, ..self.clone() }
    }
}

/// Keys and what they are, for messages.
pub(super) fn listed<'c>(all: impl IntoIterator<Item = &'c Candidate>) -> String {
    let one = |c: &Candidate| match c.key.as_str() {
        "" => format!("\"\" (the top; {})", c.role.name()),
        key => format!("{key:?} ({})", c.role.name()),
    };
    all.into_iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The one that is meant: the one of the key, or the only one that is averaged, or the only one. The error is the reason alone.
pub(super) fn choose<'c>(
    all: &'c [Candidate],
    found: &Found,
    key: Option<&str>,
) -> Result<&'c Candidate, String> {
    const ASK: &str = "say which one is meant, with ddpm import FILE --key NAME";
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
    let unsure = |sets: &[&'c Candidate], why: &str| {
        // The same tensors in several places are no question.
        if sets.iter().all(|c| c.is_same(sets[0])) {
            return Ok(sets[0]);
        }
        Err(format!("has several sets of weights, and {why}: {}; {ASK}", listed(sets.iter().copied())))
    };
    let averaged = one_of(&[Role::Averaged]);
    match (&averaged[..], key) {
        ([one], _) => return Ok(one),
        ([], Some(key)) if of.is_empty() => {
            return Err(match all.is_empty() {
                true => "has no weights of our networks".to_owned(),
                false => format!("has no weights called {key:?}; --key can be one of {}", listed(all)),
            });
        }
        ([], _) => {}
        (several, _) => return unsure(several, "more than one is averaged"),
    }
    let unread = if key.is_none() { unread_averages(all, found) } else { Vec::new() };
    let (raw, rest) = (one_of(&[Role::Plain, Role::Raw]), one_of(&[Role::Optimizer]));
    match (&raw[..], &unread[..]) {
        ([one], []) => Ok(one),
        ([], _) => match rest.is_empty() {
            true => Err(nothing(found)),
            false => Err(format!(
                "has no weights but what an optimizer keeps: {}; {ASK}",
                listed(rest.iter().copied())
            )),
        },
        (_, [first, ..]) => Err(format!(
            "has averaged weights ({first}) in a form that is not read; the others are {}: {ASK}, or save the averaged \
             ones alone",
            listed(raw.iter().copied())
        )),
        (several, []) => unsure(several, "which one is meant is not clear"),
    }
}

/// Places whose names say that averages are there, and where none of our networks was seen.
fn unread_averages(all: &[Candidate], found: &Found) -> Vec<String> {
    let is_weights = |t: &Listed| t.shape.iter().product::<usize>() > 1;
    let used: HashSet<_> = all.iter().flat_map(|c| &c.tensors).map(|t| (&t.at, t.part)).collect();
    let mut places = Vec::new();
    for set in &found.sets {
        let here = is_averaged(&set.place);
        let left = set.tensors.iter().filter(|t| is_weights(t) && !used.contains(&(&t.at, t.part)));
        let first = left.filter(|t| here || (!set.is_list && is_averaged(&t.name))).map(|t| &t.name);
        places.extend(first.take(1).map(|name| match here {
            true => set.place.clone(),
            false => joined(&set.place, name),
        }));
    }
    places
}

/// What to say of a file without weights of our networks.
fn nothing(found: &Found) -> String {
    let shown = |t: &Listed| t.name.chars().filter(|c| !c.is_control()).take(100).collect::<String>();
    let names: Vec<String> =
        found.sets.iter().filter(|s| !s.is_list).flat_map(|s| &s.tensors).map(shown).take(3).collect();
    let list = found.sets.iter().find(|s| s.is_list);
    let there = match (&names[..], list) {
        ([], Some(list)) => format!(
            "it has a list of {} tensors without names ({}), as averages keep them; give the file that has the network's \
             state_dict() as well",
            list.tensors.len(),
            if list.place.is_empty() { "the whole file" } else { &list.place }
        ),
        ([], None) => "it has no tensors".to_owned(),
        _ => format!("it has tensors as {}", names.join(", ")),
    };
    let unread = found.sets.iter().find_map(|s| s.unread.first());
    let unread = unread.map_or(String::new(), |(name, why)| format!("; tensor {name} is {why}"));
    let left = match &found.left_out[..] {
        [] => String::new(),
        left => format!(
            "; what only code outside the file could make was left out, for ddpm never runs any: {}. If the weights are in \
             there, save them alone, in PyTorch: torch.save(model.state_dict(), FILE)",
            told(left, found.more)
        ),
    };
    format!(
        "is of none of our networks, attention, simple, double-conv, unet2d (diffusers' UNet2DModel): {there}{unread}{left}"
    )
}

/// Entries that were left out, and what they are.
pub(super) fn told(left: &[(String, String)], more: usize) -> String {
    const SHOWN: usize = 12;
    let clean = |text: &str| text.chars().filter(|c| !c.is_control()).take(100).collect::<String>();
    let one = |(place, what): &(String, String)| match place.as_str() {
        "" => format!("the whole file ({what})"),
        place => format!("{} ({what})", clean(place)),
    };
    let shown: Vec<_> = left.iter().take(SHOWN).map(one).collect();
    let more = more + left.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", shown.join(", "))
}
