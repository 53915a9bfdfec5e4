//! Settings as TOML with a comment on every key.

use std::fmt::Write;

use super::{Config, NetworkKind, SECTIONS};

impl Config {
    /// The network's name in the settings.
    pub fn network_name(&self) -> &'static str {
        crate::nets::from_config(self, 1).name()
    }

    /// Keys and values of the network's own section, without those that are unset.
    pub fn network_settings(&self) -> Vec<(&'static str, String)> {
        let own =
            NetworkKind::SECTIONS.iter().find(|(kind, _)| *kind == self.network.name).map(|(_, name)| *name);
        let sections = SECTIONS.iter().zip(self.values()).filter(|(section, _)| Some(section.name) == own);
        let values = sections.flat_map(|(section, values)| section.settings.iter().zip(values));
        values.filter_map(|(setting, value)| Some((setting.name, value?.to_string()))).collect()
    }

    /// Every setting as TOML, each under its one-line explanation; unset ones stand in comments. The settings of networks
    /// that are not used are left out. Reading the text
    /// back gives the same settings. A seed above `i64::MAX`, which TOML has no number for and
    /// [`validate`](Self::validate) refuses, is left out.
    pub fn to_toml_commented(&self) -> String {
        let mut text =
            String::from("# Settings of a ddpm run. To train with them: ddpm train --config THIS_FILE\n");
        let default = Config::default().values();
        for ((section, values), defaults) in SECTIONS.iter().zip(self.values()).zip(default) {
            if !self.uses(section.name) {
                continue;
            }
            // Writing to a String cannot fail.
            let _ = write!(text, "\n# {}\n[{}]\n", section.about, section.name);
            for ((setting, value), default) in section.settings.iter().zip(values).zip(defaults) {
                let _ = match &default {
                    Some(default) => writeln!(text, "# {} (default {default})", setting.doc),
                    None => writeln!(text, "# {} (default unset)", setting.doc),
                };
                let _ = match value {
                    Some(value) => writeln!(text, "{} = {value}", setting.name),
                    None => writeln!(text, "# {} =", setting.name),
                };
            }
        }
        text
    }
}
