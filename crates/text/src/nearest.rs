//! "Did you mean".

/// Maximum length of names compared by edit distance.
const MAX_LEN: usize = 1024;

/// The candidate most similar to `word`, if one is close enough to be a typo or contains it.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
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
