//! Converts the configuration of diffusers' unconditional pipelines to our settings and back: the network, the scheduler and
//! `model_index.json`.

mod scheduler;
mod unet;

use std::cell::RefCell;
use std::collections::HashSet;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::storage;
use crate::{Error, Result};

pub(super) use scheduler::{DDIM, scheduler, scheduler_class, scheduler_json};
pub(super) use unet::{defaults, is_unet, unet, unet_json};

/// Maximum length of a configuration file in bytes; one may list all betas.
const MAX_FILE: u64 = 4 << 20;
/// Default number of steps of `DDPMPipeline`.
const PIPELINE_STEPS: usize = 1000;
/// The diffusers version whose format is written.
const VERSION: &str = "0.42.1";

/// Reads a diffusers configuration file and tracks which keys were used, so that unknown ones are rejected.
struct ConfigReader<'a> {
    path: &'a Path,
    keys: &'a Map<String, Value>,
    used: RefCell<HashSet<&'static str>>,
}

/// A value, shortened for a message.
fn shown(value: &Value) -> String {
    let text: String = value.to_string().chars().take(100).collect();
    text
}

impl<'a> ConfigReader<'a> {
    fn new(path: &'a Path, json: &'a Value) -> Result<Self> {
        match json.as_object() {
            Some(keys) => Ok(Self { path, keys, used: RefCell::default() }),
            None => Err(invalid(path, "is not a JSON object".into())),
        }
    }

    fn refuse<T>(&self, key: &str, value: &Value, choices: &str) -> Result<T> {
        Err(invalid(self.path, format!("{key}: {} is not supported; {choices}", shown(value))))
    }

    /// The value of a key; `None` if it is missing or null.
    fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.used.borrow_mut().insert(key);
        self.keys.get(key).filter(|v| !v.is_null())
    }

    fn get_or<T>(
        &self,
        key: &'static str,
        default: T,
        what: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => read(value).map_or_else(|| self.refuse(key, value, what), Ok),
        }
    }

    fn integer(&self, key: &'static str, default: usize) -> Result<usize> {
        self.get_or(key, default, "give an integer", as_integer)
    }

    fn number(&self, key: &'static str, default: f64) -> Result<f64> {
        self.get_or(key, default, "give a number", Value::as_f64)
    }

    fn flag(&self, key: &'static str, default: bool) -> Result<bool> {
        self.get_or(key, default, "give true or false", Value::as_bool)
    }

    fn choice<T: Copy>(&self, key: &'static str, default: T, choices: &[(&str, T)]) -> Result<T> {
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        let one = |value: &Value| choices.iter().find(|(name, _)| value.as_str() == Some(name)).map(|c| c.1);
        self.get_or(key, default, &format!("give one of {}", names.join(", ")), one)
    }

    fn list<T>(
        &self,
        key: &'static str,
        default: Vec<T>,
        what: &str,
        one: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<T>> {
        self.get_or(key, default, what, |value| value.as_array()?.iter().map(&one).collect())
    }

    /// Rejects a key whose value is set to anything other than `allowed`.
    fn allow_only(&self, key: &'static str, allowed: &[Value], choices: &str) -> Result<()> {
        match self.get(key) {
            Some(value) if !allowed.contains(value) => self.refuse(key, value, choices),
            _ => Ok(()),
        }
    }

    /// Rejects keys that were never used.
    fn finish(&self) -> Result<()> {
        let used = self.used.borrow();
        let unknown = |(key, value): &(&String, &Value)| {
            !key.starts_with('_') && !value.is_null() && !used.contains(key.as_str())
        };
        match self.keys.iter().find(unknown) {
            None => Ok(()),
            Some((key, value)) => {
                let key: String = key.chars().take(100).collect();
                self.refuse(&key, value, "unknown setting; remove it if it has no effect")
            }
        }
    }
}

fn as_integer(value: &Value) -> Option<usize> {
    // Some tools write integers as 2.0.
    let float = value.as_f64().filter(|f| f.fract() == 0.0 && (0.0..9e15).contains(f)).map(|f| f as u64);
    usize::try_from(value.as_u64().or(float)?).ok()
}

fn invalid(path: &Path, reason: String) -> Error {
    Error::ConfigFile { path: path.to_owned(), reason }
}

/// Reads a diffusers configuration file.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    let bytes = storage::read(path, "read the settings", MAX_FILE)?;
    parse_json(path, &bytes)
}

/// Parses the content of the configuration file `path`.
pub(super) fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(&without_infinities(bytes))
        .map_err(|e| invalid(path, format!("is not valid JSON: {e}")))
}

/// Quotes `NaN`, `Infinity` and `-Infinity`, which Python writes although JSON does not allow them. As strings, they are
/// rejected by any numeric setting, with its key.
fn without_infinities(bytes: &[u8]) -> Vec<u8> {
    const WORDS: [&[u8]; 3] = [b"-Infinity", b"Infinity", b"NaN"];
    let (mut out, mut quoted, mut i) = (Vec::with_capacity(bytes.len()), false, 0);
    while let Some(&byte) = bytes.get(i) {
        let word = WORDS.iter().find(|word| !quoted && bytes[i..].starts_with(word));
        if let Some(word) = word {
            out.extend([b"\"", *word, b"\""].concat());
            i += word.len();
            continue;
        }
        out.push(byte);
        i += 1;
        match byte {
            b'"' => quoted = !quoted,
            // An escaped character cannot end the string.
            b'\\' if quoted => {
                out.extend(bytes.get(i));
                i += 1;
            }
            _ => {}
        }
    }
    out
}
/// An unconditional pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PipelineKind {
    /// `DDPMPipeline`, which runs its scheduler for 1000 steps by default.
    Ddpm,
    /// `DDIMPipeline`, which converts its scheduler to `DDIMScheduler` and runs it for 50 steps by default.
    Ddim,
}

impl PipelineKind {
    const ALL: [(&str, Self); 2] = [("DDPMPipeline", Self::Ddpm), ("DDIMPipeline", Self::Ddim)];

    /// Applies the pipeline's way of sampling to the scheduler's settings.
    pub fn apply(self, config: &mut Config) {
        let sampling = &mut config.sampling;
        match self {
            Self::Ddim => sampling.sampler = "ddim".to_owned(),
            Self::Ddpm if sampling.sampler == "ddim" => {
                sampling.steps = Some(PIPELINE_STEPS.min(config.diffusion.timesteps));
            }
            Self::Ddpm => {}
        }
    }
}

/// The pipeline class in the `model_index.json` at `path`; `None` if it does not name one.
///
/// # Errors
/// [`Error::ConfigFile`] for any other class, by name.
pub(super) fn pipeline(path: &Path, json: &Value) -> Result<Option<PipelineKind>> {
    let r = ConfigReader::new(path, json)?;
    let Some(class) = r.get("_class_name") else { return Ok(None) };
    match PipelineKind::ALL.iter().find(|(name, _)| class == name) {
        Some((_, pipeline)) => Ok(Some(*pipeline)),
        None => r.refuse(
            "_class_name",
            class,
            "supported pipelines are DDPMPipeline and DDIMPipeline; or give the folder of its UNet2DModel",
        ),
    }
}

/// The `model_index.json` for these settings.
pub(super) fn index_json(config: &Config) -> Value {
    let scheduler = scheduler_class(config);
    json!({
        "_class_name": if scheduler == DDIM { "DDIMPipeline" } else { "DDPMPipeline" },
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", scheduler],
        "unet": ["diffusers", "UNet2DModel"],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_json_with_infinities_is_parsed() {
        let text = br#"{"a": -Infinity, "b": [NaN, Infinity, 1], "NaN": "a \" -Infinity", "c": "x\\"}"#;
        let json = parse_json(Path::new("s.json"), text).unwrap();
        let expected =
            json!({"a": "-Infinity", "b": ["NaN", "Infinity", 1], "NaN": "a \" -Infinity", "c": "x\\"});
        assert_eq!(json, expected);
        let mut config = Config::default();
        let scheduler = br#"{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity}"#;
        let json = parse_json(Path::new("s.json"), scheduler).unwrap();
        let error = scheduler::scheduler(Path::new("s.json"), &json, &mut config).unwrap_err().to_string();
        assert!(error.contains("DPMSolverMultistepScheduler"), "{error}");
        assert!(
            parse_json(Path::new("s.json"), b"{\"a\": Inf}")
                .unwrap_err()
                .to_string()
                .contains("not valid JSON")
        );
    }

    #[test]
    fn pipelines_set_sampler_and_steps() {
        let of = |pipeline: &str, sampler: &str| {
            let json = json!({"_class_name": pipeline});
            let mut config = Config::default();
            config.sampling.sampler = sampler.to_owned();
            pipeline_of(&json).apply(&mut config);
            (config.sampling.sampler, config.sampling.steps)
        };
        assert_eq!(of("DDPMPipeline", "ddpm"), ("ddpm".to_owned(), None));
        assert_eq!(of("DDPMPipeline", "ddim"), ("ddim".to_owned(), Some(1000)));
        assert_eq!(of("DDIMPipeline", "ddpm"), ("ddim".to_owned(), None));
        assert!(pipeline(Path::new("m.json"), &json!({"_class_name": "LDMPipeline"})).is_err());
    }

    fn pipeline_of(json: &Value) -> PipelineKind {
        pipeline(Path::new("m.json"), json).unwrap().unwrap()
    }
}
