//! TensorBoard's event files: `events.out.tfevents.*` in the run's folder, which `tensorboard --logdir runs` finds.
//!
//! A file is a sequence of TFRecords (length, masked CRC-32C of the length, data, masked CRC-32C of the data), each a
//! protobuf-encoded `Event` (tensorflow's `event.proto` and `summary.proto`; only the fields that are needed).
//! Steps count completed steps: the first is 1, and the samples of a step carry its number. Scalars have the names of
//! `metrics.jsonl`; sample sheets are the image `samples`. The training settings go into the HParams plugin's table.
//!
//! Each resume starts a new file, with a marker (`SessionLog.START`) that makes TensorBoard drop the steps of earlier
//! files that are repeated.

use super::{LogEvent, LogSink};
use crate::error::{Error, Result};
use crate::image::{Image, png};
use crate::run_folder::Metrics;
use crc::{CRC_32_ISCSI, Crc};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// CRC-32C, the variant of iSCSI.
const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);
/// Prefix of the names of event files.
const PREFIX: &str = "events.out.tfevents.";
/// The format version, in the first event of every file.
const VERSION: &str = "brain.Event:2";
const DOING: &str = "write the events for TensorBoard";

/// Event files of one training session; the file is created with the first event.
pub(super) struct Events {
    folder: PathBuf,
    /// The number of the next step, in a resumed run.
    first: Option<u64>,
    hyperparameters: Vec<(String, toml::Value)>,
    file: Option<EventFile>,
}

struct EventFile {
    file: File,
    path: PathBuf,
    length: u64,
}

impl Events {
    /// Event files in `folder`, which begin with the `hyperparameters`; in a run that continues after `done` steps, with
    /// the marker that later steps are repeated.
    pub fn new(folder: &Path, hyperparameters: Vec<(String, toml::Value)>, done: Option<u64>) -> Self {
        Self { folder: folder.to_owned(), first: done.map(|s| s + 1), hyperparameters, file: None }
    }

    fn file(&mut self) -> Result<&mut EventFile> {
        if self.file.is_none() {
            let mut file = EventFile::create(&self.folder, seconds_now() as u64)?;
            file.append(&event(0).text(event::FILE_VERSION, VERSION))?;
            // If a run has several files, the first one counts.
            file.append(&session_start(&self.hyperparameters, seconds_now()))?;
            if let Some(first) = self.first {
                let start = Message::default().integer(session::STATUS, session::START);
                file.append(&event(first).message(event::SESSION_LOG, &start))?;
            }
            self.file = Some(file);
        }
        Ok(self.file.as_mut().expect("it was just created"))
    }
}

impl LogSink for Events {
    fn write(&mut self, event: LogEvent<'_>) -> Result<()> {
        match event {
            LogEvent::Step(metrics) => self.file()?.append(&scalars(metrics)),
            LogEvent::Samples { step, sheet } => {
                let file = self.file()?;
                let png = png(sheet, &file.path)?;
                file.append(&image(step, sheet, &png))
            }
            LogEvent::Checkpoint => Ok(()),
        }
    }
}

impl EventFile {
    /// Creates a file whose name sorts after the existing ones, since TensorBoard reads files in the order of their names.
    fn create(folder: &Path, now: u64) -> Result<Self> {
        let entries = fs::read_dir(folder).map_err(Error::io(folder, "list the run's folder"))?;
        let number = |name: &str| -> Option<(u64, u64)> {
            let (seconds, number) = name.strip_prefix(PREFIX)?.split_once(".ddpm.")?;
            Some((seconds.parse().ok()?, number.parse().ok()?))
        };
        let last = entries.flatten().filter_map(|e| number(e.file_name().to_str()?)).max().unwrap_or((0, 0));
        // The clock may have gone backwards.
        let name = format!("{PREFIX}{:010}.ddpm.{:06}", now.max(last.0), last.1 + 1);
        let path = folder.join(name);
        let file =
            File::options().append(true).create_new(true).open(&path).map_err(Error::io(&path, DOING))?;
        Ok(Self { file, path, length: 0 })
    }

    /// Appends an event as one record. The operating system has it when this returns.
    fn append(&mut self, event: &Message) -> Result<()> {
        let record = record(&event.0);
        if let Err(e) = self.file.write_all(&record) {
            // Best effort: readers stop at a truncated record.
            let _ = self.file.set_len(self.length);
            return Err(Error::io(&self.path, DOING)(e));
        }
        self.length += record.len() as u64;
        Ok(())
    }
}

/// A TFRecord.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length, &masked_crc(&length).to_le_bytes()[..], data, &masked_crc(data).to_le_bytes()].concat()
}

/// CRC-32C, rotated and offset, so that CRCs of data that contains CRCs do not cancel out.
fn masked_crc(data: &[u8]) -> u32 {
    CRC.checksum(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Field numbers of `Event`.
mod event {
    pub const WALL_TIME: u64 = 1;
    pub const STEP: u64 = 2;
    pub const FILE_VERSION: u64 = 3;
    pub const SUMMARY: u64 = 5;
    pub const SESSION_LOG: u64 = 7;
}

/// Field number of `SessionLog`, and a value of its `status`.
mod session {
    pub const STATUS: u64 = 1;
    pub const START: u64 = 1;
}

/// Field numbers of `SummaryMetadata` and `SummaryMetadata.PluginData`; of the plugin's `HParamsPluginData` and
/// `SessionStartInfo`; of `google.protobuf.Value`, and of map entries.
mod hparams {
    pub const PLUGIN_DATA: u64 = 1;
    pub const PLUGIN_NAME: u64 = 1;
    pub const CONTENT: u64 = 2;
    pub const SESSION_START_INFO: u64 = 3;
    pub const HPARAMS: u64 = 1;
    pub const START_TIME: u64 = 5;
    pub const NUMBER: u64 = 2;
    pub const STRING: u64 = 3;
    pub const BOOL: u64 = 4;
    pub const KEY: u64 = 1;
    pub const VALUE: u64 = 2;
}

/// Field numbers of `Summary`, `Summary.Value` and `Summary.Image`.
mod summary {
    pub const VALUE: u64 = 1;
    pub const TAG: u64 = 1;
    pub const SIMPLE_VALUE: u64 = 2;
    pub const IMAGE: u64 = 4;
    pub const METADATA: u64 = 9;
    pub const HEIGHT: u64 = 1;
    pub const WIDTH: u64 = 2;
    pub const COLORSPACE: u64 = 3;
    pub const ENCODED: u64 = 4;
}

/// The start of an event.
fn event(step: u64) -> Message {
    Message::default().double(event::WALL_TIME, seconds_now()).integer(event::STEP, step)
}

/// The metrics of a step.
fn scalars(metrics: &Metrics) -> Message {
    let values = metrics.scalars().into_iter().map(|(name, value)| {
        Message::default().text(summary::TAG, name).float(summary::SIMPLE_VALUE, value as f32)
    });
    let all = values.fold(Message::default(), |all, value| all.message(summary::VALUE, &value));
    event(metrics.step).message(event::SUMMARY, &all)
}

/// A sample sheet with its PNG. TensorFlow's colour space numbers equal the channel counts.
fn image(step: u64, sheet: &Image, png: &[u8]) -> Message {
    let image = Message::default()
        .integer(summary::HEIGHT, sheet.height as u64)
        .integer(summary::WIDTH, sheet.width as u64)
        .integer(summary::COLORSPACE, sheet.channels as u64)
        .bytes(summary::ENCODED, png);
    let value = Message::default().text(summary::TAG, "samples").message(summary::IMAGE, &image);
    event(step).message(event::SUMMARY, &Message::default().message(summary::VALUE, &value))
}

/// The settings for the HParams plugin, as TensorFlow's `hparams.hparams` writes them (`plugin_data.proto`).
fn session_start(hyperparameters: &[(String, toml::Value)], now: f64) -> Message {
    use toml::Value as Setting;
    let value = |value: &Setting| match value {
        // A bool is written even if it is the default.
        Setting::Boolean(b) => {
            let mut message = Message::default().key(hparams::BOOL, 0);
            message.varint(u64::from(*b));
            message
        }
        Setting::Integer(i) => Message::default().double(hparams::NUMBER, *i as f64),
        Setting::Float(f) => Message::default().double(hparams::NUMBER, *f),
        Setting::String(text) => Message::default().text(hparams::STRING, text),
        other => Message::default().text(hparams::STRING, &other.to_string()),
    };
    let entries = hyperparameters
        .iter()
        .map(|(name, v)| Message::default().text(hparams::KEY, name).message(hparams::VALUE, &value(v)));
    let start = entries.fold(Message::default(), |all, entry| all.message(hparams::HPARAMS, &entry));
    let start = start.double(hparams::START_TIME, now);
    let content = Message::default().message(hparams::SESSION_START_INFO, &start);
    let plugin = Message::default().text(hparams::PLUGIN_NAME, "hparams").message(hparams::CONTENT, &content);
    let metadata = Message::default().message(hparams::PLUGIN_DATA, &plugin);
    let value = Message::default()
        .text(summary::TAG, "_hparams_/session_start_info")
        .message(summary::METADATA, &metadata);
    event(0).message(event::SUMMARY, &Message::default().message(summary::VALUE, &value))
}

/// Seconds since 1970.
fn seconds_now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// An encoded protobuf message: a sequence of fields, each a key (number and wire type) and a value.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut v: u64) {
        while v >= 0x80 {
            self.0.push(v as u8 | 0x80);
            v >>= 7;
        }
        self.0.push(v as u8);
    }

    fn key(mut self, field: u64, wire_type: u64) -> Self {
        self.varint(field << 3 | wire_type);
        self
    }

    /// An integer or an enum; 0 is the default and omitted.
    fn integer(self, field: u64, v: u64) -> Self {
        if v == 0 {
            return self;
        }
        let mut message = self.key(field, 0);
        message.varint(v);
        message
    }

    fn double(self, field: u64, v: f64) -> Self {
        let mut message = self.key(field, 1);
        message.0.extend(v.to_le_bytes());
        message
    }

    fn float(self, field: u64, v: f32) -> Self {
        let mut message = self.key(field, 5);
        message.0.extend(v.to_le_bytes());
        message
    }

    fn bytes(self, field: u64, v: &[u8]) -> Self {
        let mut message = self.key(field, 2);
        message.varint(v.len() as u64);
        message.0.extend(v);
        message
    }

    fn text(self, field: u64, v: &str) -> Self {
        self.bytes(field, v.as_bytes())
    }

    fn message(self, field: u64, v: &Message) -> Self {
        self.bytes(field, &v.0)
    }
}

#[cfg(test)]
mod tests;
