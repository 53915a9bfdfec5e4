//! "Did you mean".

use super::SECTIONS;

/// Longest name that is compared letter by letter.
const LONGEST: usize = 1024;

/// The candidate most like `word`, if any is near enough to be a slip of the fingers or a part of the name.
pub(crate) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    let near = |candidate: &str| {
        let (a, b) = (word.chars().count(), candidate.chars().count());
        if word.len() >= 4 && candidate.contains(&word) || candidate.len() >= 4 && word.contains(candidate) {
            return Some(a.abs_diff(b));
        }
        // The distance is not less than the difference in length, and takes memory in a * b.
        let most = (a.max(b) / 3).max(1);
        if a.abs_diff(b) > most || a.max(b) > LONGEST {
            return None;
        }
        let distance = strsim::damerau_levenshtein(&word, candidate);
        (distance <= most).then_some(distance)
    };
    candidates
        .into_iter()
        .filter_map(|c| Some((near(&c.to_lowercase())?, c)))
        .min_by_key(|&(d, _)| d)
        .map(|(_, c)| c)
}

/// What to say about the unknown setting `section.name` (`section` is empty for a key outside every section).
pub(super) fn no_such_setting(section: &str, name: &str) -> String {
    let elsewhere = || SECTIONS.iter().find(|s| s.settings.iter().any(|k| k.name == name));
    if let Some(known) = SECTIONS.iter().find(|s| s.name == section) {
        let names = || known.settings.iter().map(|k| k.name);
        return match (elsewhere(), nearest(name, names())) {
            (Some(other), _) => format!("no such setting; did you mean {}.{name}?", other.name),
            (None, Some(near)) => format!("no such setting; did you mean {near}?"),
            (None, None) => {
                format!("no such setting; [{section}] has {}", names().collect::<Vec<_>>().join(", "))
            }
        };
    }
    if let Some(other) = elsewhere() {
        return format!("no such setting; did you mean {}.{name}?", other.name);
    }
    if section.is_empty() {
        let near = |s: &super::Section| Some((s.name, nearest(name, s.settings.iter().map(|k| k.name))?));
        if let Some((section, near)) = SECTIONS.iter().find_map(near) {
            return format!("no such setting; did you mean {section}.{near}?");
        }
    }
    no_such_section(if section.is_empty() { name } else { section })
}

/// What to say about the unknown section `section`.
pub(super) fn no_such_section(section: &str) -> String {
    match nearest(section, SECTIONS.iter().map(|s| s.name)) {
        Some(near) => format!("no such section; did you mean {near}?"),
        None => {
            let all: Vec<_> = SECTIONS.iter().map(|s| s.name).collect();
            format!("no such section; the sections are {}", all.join(", "))
        }
    }
}
