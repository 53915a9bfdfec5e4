//! "Did you mean".

use super::SECTIONS;

/// Maximum length of names compared by edit distance.
const MAX_LEN: usize = 1024;

/// The candidate most similar to `word`, if one is close enough to be a typo or contains it.
pub(crate) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    let near = |candidate: &str| {
        let (a, b) = (word.chars().count(), candidate.chars().count());
        if word.len() >= 4 && candidate.contains(&word) || candidate.len() >= 4 && word.contains(candidate) {
            return Some(a.abs_diff(b));
        }
        // The distance is at least the difference in length; computing it takes memory O(a b).
        let max_distance = (a.max(b) / 3).max(1);
        if a.abs_diff(b) > max_distance || a.max(b) > MAX_LEN {
            return None;
        }
        let distance = strsim::damerau_levenshtein(&word, candidate);
        (distance <= max_distance).then_some(distance)
    };
    candidates
        .into_iter()
        .filter_map(|c| Some((near(&c.to_lowercase())?, c)))
        .min_by_key(|&(d, _)| d)
        .map(|(_, c)| c)
}

/// The error message for the unknown setting `section.name` (`section` is empty for a top-level key).
pub(super) fn no_such_setting(section: &str, name: &str) -> String {
    let elsewhere = || SECTIONS.iter().find(|s| s.settings.iter().any(|k| k.name == name));
    if let Some(known) = SECTIONS.iter().find(|s| s.name == section) {
        let names = || known.settings.iter().map(|k| k.name);
        return match (elsewhere(), nearest(name, names())) {
            (Some(other), _) => format!("unknown setting; did you mean {}.{name}?", other.name),
            (None, Some(near)) => format!("unknown setting; did you mean {near}?"),
            (None, None) => {
                format!("unknown setting; [{section}] has {}", names().collect::<Vec<_>>().join(", "))
            }
        };
    }
    if let Some(other) = elsewhere() {
        return format!("unknown setting; did you mean {}.{name}?", other.name);
    }
    if section.is_empty() {
        let near = |s: &super::Section| Some((s.name, nearest(name, s.settings.iter().map(|k| k.name))?));
        if let Some((section, near)) = SECTIONS.iter().find_map(near) {
            return format!("unknown setting; did you mean {section}.{near}?");
        }
    }
    no_such_section(if section.is_empty() { name } else { section })
}

/// The error message for the unknown section `section`.
pub(super) fn no_such_section(section: &str) -> String {
    match nearest(section, SECTIONS.iter().map(|s| s.name)) {
        Some(near) => format!("unknown section; did you mean {near}?"),
        None => {
            let all: Vec<_> = SECTIONS.iter().map(|s| s.name).collect();
            format!("unknown section; the sections are {}", all.join(", "))
        }
    }
}
