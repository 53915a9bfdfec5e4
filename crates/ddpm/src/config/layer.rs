//! One source of settings, applied over the previous ones.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Value;
use toml::de::{DeTable, DeValue};

use super::keys::{self, Key};
use super::{Config, PRESETS, RENAMED_PRESETS, SECTIONS, suggest};
use crate::{Error, Result};

/// A value for one setting.
pub(super) struct Entry {
    /// The section as written, which may be that of an alias; empty for a top-level key.
    pub section: String,
    /// The name as written.
    pub name: String,
    /// Its line in the file, from 1.
    pub line: Option<usize>,
    /// Possible interpretations of the value, most likely first; the first that fits the setting's type is used.
    pub interpretations: Vec<Value>,
}

/// One source of settings.
pub(super) struct Layer {
    /// The file the entries come from; `None` for the command line.
    pub file: Option<PathBuf>,
    pub entries: Vec<Entry>,
}

impl Layer {
    /// The preset `name`.
    pub fn preset(name: &str) -> Result<Self> {
        let current = RENAMED_PRESETS.iter().find(|(old, _)| *old == name).map_or(name, |(_, new)| new);
        let Some(preset) = PRESETS.iter().find(|p| p.name == current) else {
            let names = || PRESETS.iter().map(|p| p.name);
            let reason = match ddpm_text::nearest(name, names()) {
                Some(near) => format!("unknown preset {name:?}; did you mean {near}?"),
                None => {
                    format!(
                        "unknown preset {name:?}; the presets are {}",
                        names().collect::<Vec<_>>().join(", ")
                    )
                }
            };
            return Err(Error::Config { key: "preset".into(), reason });
        };
        Self::toml(Path::new(preset.name), preset.settings)
    }

    /// The entries of the TOML `text` of the file `path`.
    pub fn toml(path: &Path, text: &str) -> Result<Self> {
        let line = |offset: usize| text.as_bytes().iter().take(offset).filter(|&&b| b == b'\n').count() + 1;
        let syntax = |e: toml::de::Error| {
            let at = e.span().map_or(String::new(), |s| format!("line {}: ", line(s.start)));
            let reason = format!("{at}{}", e.message().replace('\n', ", "));
            Error::ConfigFile { path: path.to_owned(), reason }
        };
        if text.trim_start().starts_with('{') {
            let reason = "is JSON, but settings are TOML; give the config.toml of a run, or a file printed by `ddpm config`";
            return Err(Error::ConfigFile { path: path.to_owned(), reason: reason.to_owned() });
        }
        let spans = DeTable::parse(text).map_err(syntax)?;
        let mut values: toml::Table = toml::from_str(text).map_err(syntax)?;
        let mut entries = Vec::new();
        for (section, content) in spans.get_ref() {
            let value = values.remove(section.get_ref().as_ref());
            match (content.get_ref(), value) {
                (DeValue::Table(table), Some(Value::Table(mut values))) => {
                    if table.is_empty() {
                        known_section(section.get_ref()).map_err(|reason| Error::ConfigFile {
                            path: path.to_owned(),
                            reason: format!(
                                "line {}: {}: {reason}",
                                line(section.span().start),
                                section.get_ref()
                            ),
                        })?;
                    }
                    for key in table.keys() {
                        let interpretations = values.remove(key.get_ref().as_ref()).into_iter().collect();
                        let line = Some(line(key.span().start));
                        let (section, name) = (section.get_ref().to_string(), key.get_ref().to_string());
                        entries.push(Entry { section, name, line, interpretations });
                    }
                }
                (_, value) => entries.push(Entry {
                    section: String::new(),
                    name: section.get_ref().to_string(),
                    line: Some(line(section.span().start)),
                    interpretations: value.into_iter().collect(),
                }),
            }
        }
        // Report the first mistake in the file first.
        entries.sort_by_key(|e| e.line);
        Ok(Self { file: Some(path.to_owned()), entries })
    }

    /// Pairs of a full key and a value, as given on the command line. A later one replaces an earlier one.
    pub fn overrides(pairs: &[(String, String)]) -> Self {
        let mut entries: Vec<Entry> = Vec::new();
        for (key, text) in pairs {
            let (section, name) = key.trim().split_once('.').unwrap_or(("", key.trim()));
            let new = Entry {
                section: section.to_owned(),
                name: name.to_owned(),
                line: None,
                interpretations: interpretations(text),
            };
            entries.retain(|earlier| !earlier.names_the_setting_of(&new));
            entries.push(new);
        }
        Self { file: None, entries }
    }

    /// Applies the entries to `config`.
    pub fn apply(&self, config: &mut Config) -> Result<()> {
        self.check_conflicts()?;
        for (given, replaced) in [("steps", &mut config.train.epochs), ("epochs", &mut config.train.steps)] {
            if self.duration(given).is_some() {
                *replaced = None;
            }
        }
        for entry in &self.entries {
            let Some(key) = entry.find() else {
                let reason = if SECTIONS.iter().any(|s| entry.section.is_empty() && s.name == entry.name) {
                    "is a section, not a setting".to_owned()
                } else {
                    suggest::no_such_setting(&entry.section, &entry.name)
                };
                return Err(self.error(entry, reason));
            };
            *config = entry.set(key, config).map_err(|reason| self.error(entry, reason))?;
        }
        Ok(())
    }

    /// The entry that sets `train.steps` or `train.epochs` to a number.
    fn duration(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|e| e.section == "train" && e.name == name && !e.unsets())
    }

    /// Refuses two entries that exclude each other.
    fn check_conflicts(&self) -> Result<()> {
        if let (Some(_), Some(epochs)) = (self.duration("steps"), self.duration("epochs")) {
            return Err(self.error(epochs, "train.steps is set too; set only one of them".into()));
        }
        for (i, entry) in self.entries.iter().enumerate() {
            if let Some(other) = self.entries[..i].iter().find(|other| other.names_the_setting_of(entry)) {
                let reason = format!("is {} under another name; give only one of them", other.key());
                return Err(self.error(entry, reason));
            }
        }
        Ok(())
    }

    fn error(&self, entry: &Entry, reason: String) -> Error {
        let key = entry.key();
        match (&self.file, entry.line) {
            (Some(path), Some(line)) => {
                Error::ConfigFile { path: path.clone(), reason: format!("line {line}: {key}: {reason}") }
            }
            (Some(path), None) => {
                Error::ConfigFile { path: path.clone(), reason: format!("{key}: {reason}") }
            }
            (None, _) => Error::Config { key, reason },
        }
    }
}

impl Entry {
    fn key(&self) -> String {
        if self.section.is_empty() { self.name.clone() } else { format!("{}.{}", self.section, self.name) }
    }

    fn unsets(&self) -> bool {
        self.interpretations.iter().any(|r| r.as_str() == Some("none"))
    }

    /// The setting, by its own key or an alias.
    fn find(&self) -> Option<Key> {
        keys::find(&self.section, &self.name)
    }

    /// Whether both name the same setting, perhaps one of them by an alias.
    fn names_the_setting_of(&self, other: &Self) -> bool {
        let same_key = self.section == other.section && self.name == other.name;
        same_key || self.find().is_some_and(|key| Some(key) == other.find())
    }

    /// `config` with the setting `key` changed, or why the value is invalid.
    fn set(&self, key: Key, config: &Config) -> Result<Config, String> {
        let table = toml::Table::try_from(config).map_err(|e| e.to_string())?;
        let with = |value: Option<Value>| {
            let mut table = table.clone();
            if let Some(Value::Table(section)) = table.get_mut(key.section) {
                section.remove(key.name);
                if let Some(value) = value {
                    section.insert(key.name.to_owned(), value);
                }
            }
            Config::deserialize(table).map_err(|e| plain(e.message()))
        };
        // Removing the key unsets an optional setting; for any other it is an error.
        if self.unsets()
            && let Ok(config) = with(None)
        {
            return Ok(config);
        }
        let mut reasons = Vec::new();
        for reading in &self.interpretations {
            match with(Some(reading.clone())) {
                Ok(config) => return Ok(config),
                Err(reason) => reasons.push(reason),
            }
        }
        // "unknown variant" for an item of a list is more helpful than "not a list" for the whole text.
        let at = reasons.iter().position(|reason| reason.starts_with("unknown variant")).unwrap_or(0);
        Err(reasons.into_iter().nth(at).unwrap_or_else(|| "has no value".into()))
    }
}

fn known_section(name: &str) -> Result<(), String> {
    if SECTIONS.iter().any(|s| s.name == name) { Ok(()) } else { Err(suggest::no_such_section(name)) }
}

/// Possible interpretations of a value on the command line: TOML; an integer such as `1e5`; the text itself; a list without
/// brackets, of values or of bare words.
fn interpretations(text: &str) -> Vec<Value> {
    let value = text.parse::<Value>().ok();
    let integer = match value {
        // 2^53: up to there an f64 represents every integer exactly.
        Some(Value::Float(f)) if f.fract() == 0.0 && f.abs() <= 9_007_199_254_740_992.0 => {
            Some(Value::Integer(f as i64))
        }
        _ => None,
    };
    let list = format!("[{text}]").parse().ok();
    let bare = text.trim().strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    let word = |word: &str| {
        let word = word.trim();
        word.parse().ok().filter(Value::is_str).unwrap_or_else(|| Value::String(word.to_owned()))
    };
    let words = Value::Array(bare.split(',').map(word).collect());
    [value, integer, Some(Value::String(text.to_owned())), list, Some(words)].into_iter().flatten().collect()
}

/// serde's message without Rust type names.
fn plain(message: &str) -> String {
    let mut text = message.trim().replace('\n', " ");
    for (rust, plain) in [
        ("expected usize", "expected a non-negative integer"),
        ("expected u64", "expected a non-negative integer"),
        ("expected f64", "expected a number"),
        ("expected a boolean", "expected true or false"),
        ("expected a sequence", "expected a list, e.g. [1, 2]"),
        ("floating point", "the number"),
    ] {
        text = text.replace(rust, plain);
    }
    text
}
