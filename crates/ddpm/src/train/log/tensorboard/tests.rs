use super::*;

/// A field's value on the wire.
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
        other => panic!("{other:?} is not a message"),
    }
}

fn metrics(step: u64) -> Metrics {
    let (learning_rate, grad_norm) = (1e-4, 0.5);
    Metrics { step, loss: 0.25, images_per_second: 100.0, learning_rate, grad_norm, seconds: 1.0 }
}

fn settings() -> Vec<(String, toml::Value)> {
    let value = |text: &str| text.parse::<toml::Value>().unwrap();
    vec![
        ("optimizer.lr".to_owned(), value("0.001")),
        ("attention.num_heads".to_owned(), value("4")),
        ("compute.winograd".to_owned(), value("false")),
        ("loss.name".to_owned(), value("\"mse\"")),
        ("simple.widths".to_owned(), value("[8, 16]")),
    ]
}

#[test]
fn the_checksum_matches_published_vectors() {
    // RFC 3720, appendix B.4; and the catalogued check value.
    assert_eq!(CRC.checksum(&[0; 32]), 0x8a91_36aa);
    assert_eq!(CRC.checksum(&[0xff; 32]), 0x62a8_ab43);
    assert_eq!(CRC.checksum(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
    assert_eq!(CRC.checksum(b"123456789"), 0xe306_9283);
}

#[test]
fn records_equal_those_of_tensorboard() {
    // TensorBoard 2.21: RecordWriter.write(Event(...).SerializeToString()), wall_time 1.5, in hex.
    let event = |step| Message::default().double(event::WALL_TIME, 1.5).integer(event::STEP, step);
    let value = |tag: &str| Message::default().text(summary::TAG, tag);
    let loss = value("loss").float(summary::SIMPLE_VALUE, 0.25);
    let speed = value("images_per_second").float(summary::SIMPLE_VALUE, 100.0);
    let image = Message::default()
        .integer(summary::HEIGHT, 2)
        .integer(summary::WIDTH, 3)
        .integer(summary::COLORSPACE, 1)
        .bytes(summary::ENCODED, b"png");
    let image = value("samples").message(summary::IMAGE, &image);
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
            in_summary(&[&image]),
            "2600000000000000734fe30009000000000000f83f10ac022a180a160a0773616d706c6573220b080210031801220370\
             6e6765797992",
        ),
    ] {
        let hex: String = record(&event.0).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, expected);
    }
}

#[test]
fn logged_events_are_read_back_from_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let sheet = Image { height: 2, width: 3, channels: 3, data: (0..18).collect() };
    let mut events = Events::new(folder.path(), settings(), None);
    for step in 1..=200 {
        events.write(LogEvent::Step(&metrics(step))).unwrap();
    }
    events.write(LogEvent::Samples { step: 200, sheet: &sheet }).unwrap();
    events.write(LogEvent::Checkpoint).unwrap();

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
    let image = inner(&value[1].1);
    let sizes =
        [(summary::HEIGHT, Integer(2)), (summary::WIDTH, Integer(3)), (summary::COLORSPACE, Integer(3))];
    assert_eq!(image[..3], sizes);
    let Bytes(png) = &image[3].1 else { panic!("a PNG") };
    assert_eq!(image::load_from_memory(png).unwrap().as_bytes(), sheet.data);
}

#[test]
fn settings_are_written_for_the_hparams_plugin() {
    let folder = tempfile::tempdir().unwrap();
    Events::new(folder.path(), settings(), None).write(LogEvent::Step(&metrics(1))).unwrap();
    let [path] = &files(folder.path())[..] else { panic!("one file") };
    let value = inner(&inner(&read(path)[1][0].1)[0].1);
    assert_eq!(value[0], (summary::TAG, Bytes("_hparams_/session_start_info".into())));
    let plugin = inner(&inner(&value[1].1)[0].1);
    assert_eq!(plugin[0], (hparams::PLUGIN_NAME, Bytes("hparams".into())));
    let start = inner(&inner(&plugin[1].1)[0].1);
    let entries: Vec<_> = start[..5].iter().map(|(_, entry)| inner(entry)).collect();
    let name = |i: usize| entries[i][0].1 == Bytes(settings()[i].0.clone().into_bytes());
    assert!((0..5).all(name), "{entries:?}");
    let values: Vec<_> = entries.iter().map(|entry| inner(&entry[1].1).remove(0)).collect();
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
fn a_resume_is_marked_and_its_file_sorts_after_the_earlier_ones() {
    let folder = tempfile::tempdir().unwrap();
    Events::new(folder.path(), settings(), None).write(LogEvent::Step(&metrics(1))).unwrap();
    for resume in [7, 3, 0] {
        let mut events = Events::new(folder.path(), settings(), Some(resume));
        events.write(LogEvent::Step(&metrics(resume + 1))).unwrap();
    }
    let files = files(folder.path());
    let starts: Vec<_> = files[1..].iter().map(|path| read(path).remove(2)).collect();
    for (start, resume) in starts.iter().zip([7, 3, 0]) {
        assert_eq!(start[0], (event::STEP, Integer(resume + 1)));
        assert_eq!(start[1].0, event::SESSION_LOG);
        assert_eq!(inner(&start[1].1), [(session::STATUS, Integer(session::START))]);
    }
    // The clock was set back.
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
