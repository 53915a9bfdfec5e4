//! Settings as TOML with a comment above every key.

use std::fmt::Write;

use super::{Config, SECTIONS};

impl Config {
    /// The network's name in the settings.
    pub fn network_name(&self) -> &'static str {
        self.build_network(1).name()
    }

    /// Keys and values of the section of the selected network, without unset ones.
    pub fn network_settings(&self) -> Vec<(&'static str, String)> {
        let own = self.network_section();
        let sections = SECTIONS.iter().zip(self.values()).filter(|(section, _)| section.name == own);
        let values = sections.flat_map(|(section, values)| section.settings.iter().zip(values));
        values.filter_map(|(setting, value)| Some((setting.name, value?.to_string()))).collect()
    }

    /// All settings as TOML, each below its one-line documentation; unset ones are commented out, and networks that are
    /// not selected are omitted. Parsing the text gives the same settings back. A seed above `i64::MAX`, which TOML
    /// cannot represent and [`validate`](Self::validate) rejects, is omitted.
    pub fn to_toml_commented(&self) -> String {
        let mut text = String::from("# Settings of a ddpm run; train with: ddpm train --config THIS_FILE\n");
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
