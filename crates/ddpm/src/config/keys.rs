//! Full keys of settings, and the aliases that old files and users know.

use super::SECTIONS;
use std::fmt;

/// The place of a setting: `section.name`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Its section.
    pub section: &'static str,
    /// Its name in the section.
    pub name: &'static str,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.section, self.name)
    }
}

/// Every alias, a full key, with the key that it means.
pub fn aliases() -> impl Iterator<Item = (&'static str, Key)> {
    SECTIONS.iter().flat_map(|section| {
        section.settings.iter().flat_map(|setting| {
            let key = Key { section: section.name, name: setting.name };
            setting.aliases.iter().map(move |&alias| (alias, key))
        })
    })
}

/// The setting with this full key or alias.
pub(super) fn find(section: &str, name: &str) -> Option<Key> {
    let own = SECTIONS.iter().find(|s| s.name == section).and_then(|s| {
        let setting = s.settings.iter().find(|k| k.name == name)?;
        Some(Key { section: s.name, name: setting.name })
    });
    own.or_else(|| {
        let is_it = |alias: &str| alias.split_once('.') == Some((section, name));
        aliases().find(|(alias, _)| is_it(alias)).map(|(_, key)| key)
    })
}

/// The first setting with this name in any section, or else with an alias of this name.
pub fn find_name(name: &str) -> Option<Key> {
    let own = SECTIONS.iter().find_map(|section| {
        let setting = section.settings.iter().find(|k| k.name == name)?;
        Some(Key { section: section.name, name: setting.name })
    });
    own.or_else(|| aliases().find(|(alias, _)| name_of(alias) == name).map(|(_, key)| key))
}

/// The name in a full key.
pub(super) fn name_of(key: &str) -> &str {
    key.split_once('.').map_or(key, |(_, name)| name)
}
