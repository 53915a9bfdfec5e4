//! TensorBoard's event files: `events.out.tfevents.*` in the run's folder, which `tensorboard --logdir runs` finds.
//!
//! A file is a sequence of TFRecords (length, masked CRC-32C of the length, data, masked CRC-32C of the data), each an
//! `Event` in protobuf's encoding (tensorflow's `event.proto` and `summary.proto`; only the fields that are needed).
//! Steps count as made: the first is 1, and the samples of a step have its number. Scalars have the names of
//! `metrics.jsonl`; the sheets are the image `samples`. What the settings ask of the training stands in the HParams plugin's
//! table.
//!
//! Each time a run is taken up a new file begins, with the mark (`SessionLog.START`) that makes TensorBoard drop the
//! steps of earlier files that are made again.

use super::{Entry, Listener};
use crate::error::{Error, Result};
use crate::picture::{Picture, png};
use crate::train::run::Metrics;
use crc::{CRC_32_ISCSI, Crc};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// CRC-32C, as iSCSI has it.
const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);
/// What the names of event files begin with.
const PREFIX: &str = "events.out.tfevents.";
/// The version of the format, as the first event of every file tells it.
const VERSION: &str = "brain.Event:2";
const DOING: &str = "write the events for TensorBoard";

/// Event files of one training, the file begun with the first entry.
pub(super) struct Events {
    folder: PathBuf,
    /// The number of the step that is made next in a run that is taken up.
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
    /// Event files in `folder`, which begin with the `hyperparameters`; in a run that goes on after `done` steps with the mark that
    /// later ones are made again.
    pub fn new(folder: &Path, hyperparameters: Vec<(String, toml::Value)>, done: Option<u64>) -> Self {
        Self { folder: folder.to_owned(), first: done.map(|s| s + 1), hyperparameters, file: None }
    }

    fn file(&mut self) -> Result<&mut EventFile> {
        if self.file.is_none() {
            let mut file = EventFile::create(&self.folder, seconds_now() as u64)?;
            file.append(&event(0).text(event::FILE_VERSION, VERSION))?;
            // Of several files of a run the first counts.
            file.append(&session_start(&self.hyperparameters, seconds_now()))?;
            if let Some(first) = self.first {
                let start = Message::default().integer(session::STATUS, session::START);
                file.append(&event(first).message(event::SESSION_LOG, &start))?;
            }
            self.file = Some(file);
        }
        Ok(self.file.as_mut().expect("it was just made"))
    }
}

impl Listener for Events {
    fn hear(&mut self, entry: Entry<'_>) -> Result<()> {
        let file = self.file()?;
        match entry {
            Entry::Step(metrics) => file.append(&scalars(metrics)),
            Entry::Samples { step, sheet } => {
                let png = png(sheet, &file.path)?;
                file.append(&image(step, sheet, &png))
            }
            Entry::Checkpoint => Ok(()),
        }
    }
}

impl EventFile {
    /// A new file whose name sorts behind those that are there, as TensorBoard reads files in the order of their names.
    fn create(folder: &Path, now: u64) -> Result<Self> {
        let entries = fs::read_dir(folder).map_err(Error::io(folder, "list the run's folder"))?;
        let number = |name: &str| -> Option<(u64, u64)> {
            let (seconds, number) = name.strip_prefix(PREFIX)?.split_once(".ddpm.")?;
            Some((seconds.parse().ok()?, number.parse().ok()?))
        };
        let last = entries.flatten().filter_map(|e| number(e.file_name().to_str()?)).max().unwrap_or((0, 0));
        // Clocks go backwards at times.
        let name = format!("{PREFIX}{:010}.ddpm.{:06}", now.max(last.0), last.1 + 1);
        let path = folder.join(name);
        let file =
            File::options().append(true).create_new(true).open(&path).map_err(Error::io(&path, DOING))?;
        Ok(Self { file, path, length: 0 })
    }

    /// Appends an event as one record. It is with the operating system when this returns.
    fn append(&mut self, event: &Message) -> Result<()> {
        let record = record(&event.0);
        if let Err(e) = self.file.write_all(&record) {
            // Best effort: readers stop at a torn record.
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

/// CRC-32C turned and shifted, so that CRCs of data that has CRCs in it do not cancel out.
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

/// Of `SessionLog`, and a value of its `status`.
mod session {
    pub const STATUS: u64 = 1;
    pub const START: u64 = 1;
}

/// Of `SummaryMetadata` and `SummaryMetadata.PluginData`; of the plugin's `HParamsPluginData` and `SessionStartInfo`; of
/// `google.protobuf.Value`, and of a map's entries.
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

/// Of `Summary`, `Summary.Value` and `Summary.Image`.
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

/// What a step measured.
fn scalars(metrics: &Metrics) -> Message {
    let values = metrics.scalars().into_iter().map(|(name, value)| {
        Message::default().text(summary::TAG, name).float(summary::SIMPLE_VALUE, value as f32)
    });
    let all = values.fold(Message::default(), |all, value| all.message(summary::VALUE, &value));
    event(metrics.step).message(event::SUMMARY, &all)
}

/// A sample sheet with its PNG. TensorFlow numbers colour spaces by their channels.
fn image(step: u64, sheet: &Picture, png: &[u8]) -> Message {
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
        // A bool is written even where it is the default.
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

/// A protobuf message as it is encoded: fields one after another, each a key (number and wire type) and its value.
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

    /// An integer or an enum; 0 is the default and left out.
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
mod tests {
    use super::*;

    /// A field's value as it is on the wire.
    #[derive(Debug, PartialEq)]
    enum Value {
        Integer(u64),
        Double(f64),
        Float(f32),
        Bytes(Vec<u8>),
    }
    use Value::{Bytes, Double, Float, Integer};

    fn take<'a>(data: &mut &'a [u8], n: usize) -> &'a [u8] {
        let (head, tail) = data.split_at(n);
        *data = tail;
        head
    }

    fn varint(data: &mut &[u8]) -> u64 {
        let mut v = 0;
        for i in 0.. {
            let byte = take(data, 1)[0];
            v |= u64::from(byte & 0x7f) << (7 * i);
            if byte < 0x80 {
                break;
            }
        }
        v
    }

    fn fields(mut data: &[u8]) -> Vec<(u64, Value)> {
        let data = &mut data;
        let mut fields = Vec::new();
        while !data.is_empty() {
            let key = varint(data);
            let value = match key & 7 {
                0 => Integer(varint(data)),
                1 => Double(f64::from_le_bytes(take(data, 8).try_into().unwrap())),
                2 => {
                    let length = varint(data) as usize;
                    Bytes(take(data, length).to_vec())
                }
                5 => Float(f32::from_le_bytes(take(data, 4).try_into().unwrap())),
                other => panic!("wire type {other}"),
            };
            fields.push((key >> 3, value));
        }
        fields
    }

    /// The events of a file, without their times.
    fn read(path: &Path) -> Vec<Vec<(u64, Value)>> {
        let bytes = fs::read(path).unwrap();
        let data = &mut &bytes[..];
        let mut events = Vec::new();
        while !data.is_empty() {
            let length = take(data, 8);
            assert_eq!(take(data, 4), masked_crc(length).to_le_bytes());
            let content = take(data, u64::from_le_bytes(length.try_into().unwrap()) as usize);
            assert_eq!(take(data, 4), masked_crc(content).to_le_bytes());
            let mut event = fields(content);
            assert!(matches!(event.remove(0), (event::WALL_TIME, Double(t)) if t > 1.7e9));
            events.push(event);
        }
        events
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files
    }

    fn inner(value: &Value) -> Vec<(u64, Value)> {
        match value {
            Bytes(bytes) => fields(bytes),
            other => panic!("{other:?} is no message"),
        }
    }

    fn metrics(step: u64) -> Metrics {
        let (learning_rate, grad_norm) = (1e-4, 0.5);
        Metrics { step, loss: 0.25, images_per_second: 100.0, learning_rate, grad_norm, seconds: 1.0 }
    }

    fn settings() -> Vec<(String, toml::Value)> {
        let value = |text: &str| text.parse::<toml::Value>().unwrap();
        vec![
            ("train.lr".to_owned(), value("0.001")),
            ("attention.num_heads".to_owned(), value("4")),
            ("train.winograd".to_owned(), value("false")),
            ("train.loss".to_owned(), value("\"mse\"")),
            ("simple.widths".to_owned(), value("[8, 16]")),
        ]
    }

    #[test]
    fn the_checksum_agrees_with_published_vectors() {
        // RFC 3720, appendix B.4; and the check value of the catalogues.
        assert_eq!(CRC.checksum(&[0; 32]), 0x8a91_36aa);
        assert_eq!(CRC.checksum(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(CRC.checksum(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
        assert_eq!(CRC.checksum(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn records_are_those_that_tensorboard_writes() {
        // TensorBoard 2.21: RecordWriter.write(Event(...).SerializeToString()), wall_time 1.5, in hex.
        let event = |step| Message::default().double(event::WALL_TIME, 1.5).integer(event::STEP, step);
        let value = |tag: &str| Message::default().text(summary::TAG, tag);
        let loss = value("loss").float(summary::SIMPLE_VALUE, 0.25);
        let speed = value("images_per_second").float(summary::SIMPLE_VALUE, 100.0);
        let picture = Message::default()
            .integer(summary::HEIGHT, 2)
            .integer(summary::WIDTH, 3)
            .integer(summary::COLORSPACE, 1)
            .bytes(summary::ENCODED, b"png");
        let picture = value("samples").message(summary::IMAGE, &picture);
        let in_summary = |values: &[&Message]| {
            let all = values.iter().fold(Message::default(), |all, value| all.message(summary::VALUE, value));
            event(300).message(event::SUMMARY, &all)
        };
        let start = Message::default().integer(session::STATUS, session::START);
        for (event, expected) in [
            (
                event(0).text(event::FILE_VERSION, VERSION),
                "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c",
            ),
            (
                event(300).message(event::SESSION_LOG, &start),
                "100000000000000095fbfe1809000000000000f83f10ac023a020801713b788a",
            ),
            (
                in_summary(&[&loss, &speed]),
                "3500000000000000d6c55de609000000000000f83f10ac022a270a0b0a046c6f7373150000803e0a180a11696d616765\
                 735f7065725f7365636f6e64150000c8428d23a4be",
            ),
            (
                in_summary(&[&picture]),
                "2600000000000000734fe30009000000000000f83f10ac022a180a160a0773616d706c6573220b080210031801220370\
                 6e6765797992",
            ),
        ] {
            let hex: String = record(&event.0).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hex, expected);
        }
    }

    #[test]
    fn what_is_told_comes_back_from_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let sheet = Picture { height: 2, width: 3, channels: 3, data: (0..18).collect() };
        let mut events = Events::new(folder.path(), settings(), None);
        for step in 1..=200 {
            events.hear(Entry::Step(&metrics(step))).unwrap();
        }
        events.hear(Entry::Samples { step: 200, sheet: &sheet }).unwrap();
        events.hear(Entry::Checkpoint).unwrap();

        let [path] = &files(folder.path())[..] else { panic!("one file") };
        let read = read(path);
        assert_eq!(read.len(), 203);
        assert_eq!(read[0], [(event::FILE_VERSION, Bytes(VERSION.into()))]);
        for (i, event) in read[2..202].iter().enumerate() {
            assert_eq!(event[0], (event::STEP, Integer(i as u64 + 1)));
            let values = inner(&event[1].1);
            assert_eq!(values.len(), metrics(0).scalars().into_iter().count());
            for ((_, value), (name, number)) in values.iter().zip(metrics(0).scalars()) {
                let expected =
                    [(summary::TAG, Bytes(name.into())), (summary::SIMPLE_VALUE, Float(number as f32))];
                assert_eq!(inner(value), expected);
            }
        }
        assert_eq!(read[202][0], (event::STEP, Integer(200)));
        let value = inner(&inner(&read[202][1].1)[0].1);
        assert_eq!(value[0], (summary::TAG, Bytes("samples".into())));
        let picture = inner(&value[1].1);
        let sizes =
            [(summary::HEIGHT, Integer(2)), (summary::WIDTH, Integer(3)), (summary::COLORSPACE, Integer(3))];
        assert_eq!(picture[..3], sizes);
        let Bytes(png) = &picture[3].1 else { panic!("a PNG") };
        assert_eq!(image::load_from_memory(png).unwrap().as_bytes(), sheet.data);
    }

    #[test]
    fn the_settings_are_hyperparameters_of_the_hparams_plugin() {
        let folder = tempfile::tempdir().unwrap();
        Events::new(folder.path(), settings(), None).hear(Entry::Checkpoint).unwrap();
        let [path] = &files(folder.path())[..] else { panic!("one file") };
        let value = inner(&inner(&read(path)[1][0].1)[0].1);
        assert_eq!(value[0], (summary::TAG, Bytes("_hparams_/session_start_info".into())));
        let plugin = inner(&inner(&value[1].1)[0].1);
        assert_eq!(plugin[0], (hparams::PLUGIN_NAME, Bytes("hparams".into())));
        let start = inner(&inner(&plugin[1].1)[0].1);
        let told: Vec<_> = start[..5].iter().map(|(_, entry)| inner(entry)).collect();
        let name = |i: usize| told[i][0].1 == Bytes(settings()[i].0.clone().into_bytes());
        assert!((0..5).all(name), "{told:?}");
        let values: Vec<_> = told.iter().map(|entry| inner(&entry[1].1).remove(0)).collect();
        let (number, text) = (hparams::NUMBER, hparams::STRING);
        let expected = [
            (number, Double(0.001)),
            (number, Double(4.0)),
            (hparams::BOOL, Integer(0)),
            (text, Bytes("mse".into())),
            (text, Bytes("[8, 16]".into())),
        ];
        assert_eq!(values, expected);
        assert!(matches!(start[5], (hparams::START_TIME, Double(t)) if t > 1.7e9));
    }

    #[test]
    fn a_resume_is_marked_and_its_file_sorts_behind_the_earlier_ones() {
        let folder = tempfile::tempdir().unwrap();
        Events::new(folder.path(), settings(), None).hear(Entry::Step(&metrics(1))).unwrap();
        for resume in [7, 3, 0] {
            let mut events = Events::new(folder.path(), settings(), Some(resume));
            events.hear(Entry::Step(&metrics(resume + 1))).unwrap();
        }
        let files = files(folder.path());
        let starts: Vec<_> = files[1..].iter().map(|path| read(path).remove(2)).collect();
        for (start, resume) in starts.iter().zip([7, 3, 0]) {
            assert_eq!(start[0], (event::STEP, Integer(resume + 1)));
            assert_eq!(start[1].0, event::SESSION_LOG);
            assert_eq!(inner(&start[1].1), [(session::STATUS, Integer(session::START))]);
        }
        // A clock that was set back.
        let early = EventFile::create(folder.path(), 5).unwrap().path;
        assert!(files.iter().all(|path| *path < early));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_that_names_the_file() {
        let path = PathBuf::from("/dev/full");
        let file = File::options().append(true).open(&path).unwrap();
        let mut file = EventFile { file, path, length: 0 };
        let message = file.append(&event(1)).unwrap_err().to_string();
        assert!(
            message.starts_with("/dev/full: cannot write the events for TensorBoard: No space left"),
            "{message}"
        );
        assert_eq!(file.length, 0);
    }
}
