//! One setting with its documentation, and the sections that declare them.
//!
//! A section belongs to what it configures: each network's is in the network's file, that of the hardware in `hardware.rs`.
//! `config` assembles them. Nothing here knows which sections there are.

pub mod check;

/// One setting of a section.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// The key inside its section, e.g. `batch_size`.
    pub name: &'static str,
    /// Meaning, unit, and what leaving it unset does.
    pub doc: &'static str,
    /// The effect of changing it in a resumed run.
    pub change: Change,
    /// Full keys that also name it, e.g. those of earlier versions.
    pub aliases: &'static [&'static str],
}

/// The effect of changing a setting in a run that is already partly trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// None: it does not affect what is learnt.
    Free,
    /// Training continues, but differs from the original plan; the user gets a note.
    Noted,
    /// Weights trained with the old value are of little use with the new one. Refused unless forced.
    Breaking,
}

/// One section of the settings.
#[derive(Clone, Copy, Debug)]
pub struct Section {
    /// The section's name, e.g. `train`.
    pub name: &'static str,
    /// What the section configures.
    pub about: &'static str,
    /// Its settings, in print order.
    pub settings: &'static [Setting],
}

/// The settings of a section, as declared by `section!`.
pub trait Settings {
    /// What the section configures.
    const ABOUT: &'static str;
    /// Its settings, in print order.
    const SETTINGS: &'static [Setting];

    /// The values in the order of [`SETTINGS`](Self::SETTINGS); `None` where unset.
    fn values(&self) -> Vec<Option<toml::Value>>;
}

/// Declares the struct of a section: its settings with documentation, type and default. Each starts with the effect of
/// changing it in a resumed run, `free`, `noted` or `breaking` ([`Change`]); it is mandatory. `#[alias = "optimizer.lr"]` is
/// another full key for a setting. The docs are also those of the commented TOML.
macro_rules! section {
    (
        #[doc = $about:literal]
        pub struct $config:ident {
            $( #[doc = $doc:literal] $( #[alias = $alias:literal] )* $change:ident $field:ident: $type:ty = $default:expr, )+
        }
    ) => {
        #[doc = $about]
        #[derive(Clone, Debug, PartialEq, ::serde::Serialize, ::serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $config {
            $( #[doc = $doc] pub $field: $type, )+
        }

        impl Default for $config {
            fn default() -> Self {
                Self { $( $field: $default, )+ }
            }
        }

        impl $crate::settings::Settings for $config {
            const ABOUT: &'static str = $about.trim_ascii();
            const SETTINGS: &'static [$crate::settings::Setting] = &[ $(
                $crate::settings::Setting {
                    name: stringify!($field),
                    doc: $doc.trim_ascii(),
                    change: $crate::settings::change!($change),
                    aliases: &[ $( $alias ),* ],
                },
            )+ ];

            fn values(&self) -> Vec<Option<::toml::Value>> {
                vec![ $( ::toml::Value::try_from(&self.$field).ok(), )+ ]
            }
        }
    };
}

macro_rules! change {
    (free) => {
        $crate::settings::Change::Free
    };
    (noted) => {
        $crate::settings::Change::Noted
    };
    (breaking) => {
        $crate::settings::Change::Breaking
    };
}

pub(crate) use {change, section};
