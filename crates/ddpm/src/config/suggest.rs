//! "Did you mean".

use super::keys::{self, Key};
use super::{SECTIONS, Section};
use ddpm_text::nearest;

/// The error message for the unknown setting `section.name` (`section` is empty for a top-level key).
pub(super) fn no_such_setting(section: &str, name: &str) -> String {
    let elsewhere = keys::find_name(name);
    if let Some(known) = SECTIONS.iter().find(|s| s.name == section) {
        return match (elsewhere, nearest_in(known, name)) {
            (Some(key), _) => format!("unknown setting; did you mean {key}?"),
            (None, Some(key)) if key.section == section => {
                format!("unknown setting; did you mean {}?", key.name)
            }
            (None, Some(key)) => format!("unknown setting; did you mean {key}?"),
            (None, None) => {
                let names: Vec<_> = known.settings.iter().map(|k| k.name).collect();
                format!("unknown setting; [{section}] has {}", names.join(", "))
            }
        };
    }
    if let Some(key) = elsewhere {
        return format!("unknown setting; did you mean {key}?");
    }
    if section.is_empty()
        && let Some(key) = SECTIONS.iter().find_map(|s| nearest_in(s, name))
    {
        return format!("unknown setting; did you mean {key}?");
    }
    no_such_section(if section.is_empty() { name } else { section })
}

/// The setting whose name in `section`, or alias there, is nearest to `name`.
fn nearest_in(section: &Section, name: &str) -> Option<Key> {
    let own = section.settings.iter().map(|k| (k.name, Key { section: section.name, name: k.name }));
    let of_section = |(alias, key): (&'static str, Key)| {
        let (its_section, name) = alias.split_once('.')?;
        (its_section == section.name).then_some((name, key))
    };
    let all: Vec<_> = own.chain(keys::aliases().filter_map(of_section)).collect();
    let near = nearest(name, all.iter().map(|&(name, _)| name))?;
    all.iter().find(|&&(name, _)| name == near).map(|&(_, key)| key)
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
