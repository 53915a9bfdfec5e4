//! The settings of diffusers' unconditional pipelines, as ours and back: of the network, of the scheduler, and
//! `model_index.json`.

mod scheduler;
mod unet;

use std::cell::RefCell;
use std::collections::HashSet;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::train::config::Config;
use crate::train::disk;
use crate::{Error, Result};

pub(super) use scheduler::{DDIM, scheduler, scheduler_class, scheduler_json};
pub(super) use unet::{defaults, is_unet, unet, unet_json};

/// Largest file of settings that is read, in bytes; one may list all variances.
const MAX_FILE: u64 = 4 << 20;
/// Steps that `DDPMPipeline` asks for.
const PIPELINE_STEPS: usize = 1000;
/// The version of diffusers whose files these are.
const VERSION: &str = "0.42.1";

/// One of diffusers' files of settings, being read: every key must be asked for.
struct Reader<'a> {
    path: &'a Path,
    keys: &'a Map<String, Value>,
    asked: RefCell<HashSet<&'static str>>,
}

/// A value for a message.
fn shown(value: &Value) -> String {
    let text: String = value.to_string().chars().take(100).collect();
    text
}

impl<'a> Reader<'a> {
    fn new(path: &'a Path, json: &'a Value) -> Result<Self> {
        match json.as_object() {
            Some(keys) => Ok(Self { path, keys, asked: RefCell::default() }),
            None => Err(wrong(path, "is no object with settings in it".into())),
        }
    }

    fn refuse<T>(&self, key: &str, value: &Value, choices: &str) -> Result<T> {
        Err(wrong(self.path, format!("{key}: {} is not supported; {choices}", shown(value))))
    }

    /// The value of a key; `None` if it is not given, or given as nothing.
    fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(key);
        self.keys.get(key).filter(|v| !v.is_null())
    }

    fn or<T>(
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

    fn whole(&self, key: &'static str, default: usize) -> Result<usize> {
        self.or(key, default, "give a whole number", whole)
    }

    fn number(&self, key: &'static str, default: f64) -> Result<f64> {
        self.or(key, default, "give a number", Value::as_f64)
    }

    fn flag(&self, key: &'static str, default: bool) -> Result<bool> {
        self.or(key, default, "give true or false", Value::as_bool)
    }

    fn choice<T: Copy>(&self, key: &'static str, default: T, choices: &[(&str, T)]) -> Result<T> {
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        let one = |value: &Value| choices.iter().find(|(name, _)| value.as_str() == Some(name)).map(|c| c.1);
        self.or(key, default, &format!("give one of {}", names.join(", ")), one)
    }

    fn list<T>(
        &self,
        key: &'static str,
        default: Vec<T>,
        what: &str,
        one: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<T>> {
        self.or(key, default, what, |value| value.as_array()?.iter().map(&one).collect())
    }

    /// Refuses a key that says other than `only`, where it says something.
    fn only(&self, key: &'static str, only: &[Value], choices: &str) -> Result<()> {
        match self.get(key) {
            Some(value) if !only.contains(value) => self.refuse(key, value, choices),
            _ => Ok(()),
        }
    }

    /// Refuses what nobody has asked for.
    fn finish(&self) -> Result<()> {
        let asked = self.asked.borrow();
        let unknown = |(key, value): &(&String, &Value)| {
            !key.starts_with('_') && !value.is_null() && !asked.contains(key.as_str())
        };
        match self.keys.iter().find(unknown) {
            None => Ok(()),
            Some((key, value)) => {
                let key: String = key.chars().take(100).collect();
                self.refuse(
                    &key,
                    value,
                    "no setting of this name is known; take it out if it changes nothing",
                )
            }
        }
    }
}

fn whole(value: &Value) -> Option<usize> {
    // Some tools write 2.0 for 2.
    let float = value.as_f64().filter(|f| f.fract() == 0.0 && (0.0..9e15).contains(f)).map(|f| f as u64);
    usize::try_from(value.as_u64().or(float)?).ok()
}

fn wrong(path: &Path, reason: String) -> Error {
    Error::ConfigFile { path: path.to_owned(), reason }
}

/// Reads one of diffusers' files of settings.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    let bytes = disk::read(path, "read the settings", MAX_FILE)?;
    parse_json(path, &bytes)
}

/// The JSON of the file `path`.
pub(super) fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(&without_infinities(bytes)).map_err(|e| wrong(path, format!("is no JSON: {e}")))
}

/// JSON as Python writes it has `NaN`, `Infinity` and `-Infinity`, which JSON has not: they become strings, which a setting that
/// must be a number refuses by its key.
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
            // What it stands before is no end of a string.
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
pub(super) enum Pipeline {
    /// `DDPMPipeline`, which asks its scheduler for 1000 steps.
    Ddpm,
    /// `DDIMPipeline`, which makes its scheduler a `DDIMScheduler`, and asks it for 50 steps.
    Ddim,
}

impl Pipeline {
    const ALL: [(&str, Self); 2] = [("DDPMPipeline", Self::Ddpm), ("DDIMPipeline", Self::Ddim)];

    /// Puts how it samples into the settings of its scheduler.
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

/// The pipeline that the `model_index.json` at `path` is of; none where it does not say.
///
/// # Errors
/// [`Error::ConfigFile`] for any other, by its name.
pub(super) fn pipeline(path: &Path, json: &Value) -> Result<Option<Pipeline>> {
    let r = Reader::new(path, json)?;
    let Some(class) = r.get("_class_name") else { return Ok(None) };
    match Pipeline::ALL.iter().find(|(name, _)| class == name) {
        Some((_, pipeline)) => Ok(Some(*pipeline)),
        None => r.refuse(
            "_class_name",
            class,
            "the pipelines DDPMPipeline and DDIMPipeline are read; or give the folder of its UNet2DModel",
        ),
    }
}

/// `model_index.json`.
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
    fn json_as_python_writes_it_is_read() {
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
            parse_json(Path::new("s.json"), b"{\"a\": Inf}").unwrap_err().to_string().contains("no JSON")
        );
    }

    #[test]
    fn pipelines_sample_in_their_number_of_steps() {
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

    fn pipeline_of(json: &Value) -> Pipeline {
        pipeline(Path::new("m.json"), json).unwrap().unwrap()
    }
}
