//! "Did you mean".

use super::SECTIONS;
use ddpm_text::nearest;

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
