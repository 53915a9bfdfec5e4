//! A CSV file with an id in each row, and a folder with an image for each id: the form of the RSNA bone-age set.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Component, Path};

use csv::{ReaderBuilder, StringRecord};

use super::super::options::CsvOptions;
use super::super::{count, unusable};
use super::{Content, Entry, Files, Store};
use crate::error::{Error, Result};
use crate::text::{LISTED, escaped, listed, shown};
use crate::train::config::suggest::nearest;

/// Images given twice that are named.
const NAMED: usize = 5;
/// Longer files are not read.
const MAX_FILE: u64 = 32 << 20;

/// The images in `folder` that `table` names, in its order.
pub(super) fn read(folder: &Path, table: &CsvOptions) -> Result<Content> {
    let path = &table.path;
    let wrong = |reason: String| unusable(path, reason);
    let text = text(path)?;
    let mut reader =
        ReaderBuilder::new().delimiter(delimiter(&text)).flexible(true).from_reader(text.as_bytes());
    let header = reader.headers().map_err(|e| wrong(format!("its first line cannot be read: {e}")))?.clone();
    if header.iter().all(|name| name.trim().is_empty()) {
        return Err(wrong("it has no header: the first line names the columns".into()));
    }
    let ids =
        table.id_column.as_deref().map_or(Ok(0), |name| column(path, &header, "csv_id_column", name))?;
    let labels = table
        .label_column
        .as_deref()
        .map(|name| column(path, &header, "csv_label_column", name))
        .transpose()?;

    let mut rows = Vec::new();
    let mut lines: HashMap<String, u64> = HashMap::new();
    let (mut twice, mut doubles) = (Vec::new(), 0usize);
    for record in reader.records() {
        let record = record.map_err(|e| wrong(format!("it cannot be read: {e}")))?;
        let line = record.position().map_or(0, csv::Position::line);
        let cell = |column: usize| match record.get(column).map(str::trim) {
            Some(text) if !text.is_empty() => Ok(text.to_owned()),
            _ => Err(wrong(format!("line {line}: the column {:?} is empty", &header[column]))),
        };
        let (id, label) = (cell(ids)?, labels.map(cell).transpose()?);
        let name = file_name(&id, &table.extension);
        match lines.get(&name) {
            Some(first) => {
                doubles += 1;
                if twice.len() < NAMED {
                    twice.push(format!("{} (lines {first} and {line})", escaped(&id)));
                }
            }
            None => {
                lines.insert(name.clone(), line);
                rows.push((name, label, line));
            }
        }
    }
    if !twice.is_empty() {
        return Err(wrong(format!(
            "{} given twice: {}{}; every image has one row",
            if doubles == 1 { "an id is".to_owned() } else { format!("{doubles} ids are") },
            twice.join(", "),
            if doubles > twice.len() { " and so on" } else { "" }
        )));
    }
    if rows.is_empty() {
        return Err(wrong("it has a header and no rows".into()));
    }
    let mut classes: Vec<String> = rows.iter().filter_map(|(_, label, _)| label.clone()).collect();
    sort_labels(&mut classes);
    let numbers: HashMap<&str, u32> = classes.iter().map(String::as_str).zip(0..).collect();
    let (mut entries, mut bad) = (Vec::new(), Vec::new());
    for (name, label, line) in rows {
        let file = folder.join(&name);
        let table = shown(path.file_name().unwrap_or_default());
        if !Path::new(&name).components().all(|part| matches!(part, Component::Normal(_))) {
            bad.push((file, format!("is outside of the folder (line {line} of {table})")));
        } else if !file.exists() {
            bad.push((file, format!("is not there (line {line} of {table})")));
        } else {
            let label = label.and_then(|l| numbers.get(l.as_str()).copied());
            entries.push(Entry { path: file, name: name.into_bytes(), label, at: 0 });
        }
    }
    let mut notes = vec![format!("{} named by {}", count(entries.len(), "image"), shown(path))];
    if entries.is_empty() {
        let reason = format!(
            "none of the {} images that {} names is here, as {}; data.path is the folder they are in, data.csv_extension \
             ({:?}) is added to an id, and the ids are in the column {:?}",
            bad.len(),
            shown(path),
            shown(&bad[0].0),
            table.extension,
            &header[ids]
        );
        return Err(unusable(folder, reason));
    }
    if classes.len() > 100 && classes.len() * 2 > entries.len() {
        notes.push(format!(
            "{} classes for {} images: is {:?} a class?",
            classes.len(),
            entries.len(),
            table.label_column.as_deref().unwrap_or_default()
        ));
    }
    let source = Box::new(Files { entries, store: Store::Disk });
    Ok(Content { source, classes, sorted: true, notes, bad })
}

/// The file of an id: with its extension, unless the id has it, and without needless `./`.
fn file_name(id: &str, extension: &str) -> String {
    let id = id.strip_prefix("./").unwrap_or(id);
    match id.to_lowercase().ends_with(&extension.to_lowercase()) {
        true => id.to_owned(),
        false => format!("{id}{extension}"),
    }
}

fn text(path: &Path) -> Result<String> {
    let io = |e| Error::io(path, "read the CSV file (data.csv)")(e);
    let metadata = std::fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return Err(unusable(path, "it is no file; data.csv is a CSV file, data.path the images' folder"));
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path).map_err(io)?.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(unusable(path, format!("it is longer than {} MiB", MAX_FILE >> 20)));
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let line = e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
        unusable(path, format!("line {line}: it is no text in UTF-8; save it as CSV in UTF-8"))
    })?;
    // Spreadsheets put a byte order mark in front.
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

/// What stands between the columns: a comma, unless the header has none and has semicolons or tabs.
fn delimiter(text: &str) -> u8 {
    let header = text.lines().next().unwrap_or_default();
    // What stands between quotes is a name.
    let bare: String = header.split('"').step_by(2).collect();
    [b',', b';', b'\t'].into_iter().find(|&d| bare.as_bytes().contains(&d)).unwrap_or(b',')
}

/// The number of the column `name`, which the setting `key` asks for.
fn column(path: &Path, header: &StringRecord, key: &str, name: &str) -> Result<usize> {
    let names = || header.iter().map(str::trim);
    if let Some(at) = names().position(|n| n == name) {
        return Ok(at);
    }
    let hint = nearest(name, names()).map_or(String::new(), |near| format!("; did you mean {near:?}"));
    let all = listed(&names().map(|n| format!("{n:?}")).collect::<Vec<_>>(), LISTED);
    Err(unusable(path, format!("it has no column {name:?} (data.{key}){hint}; the columns are {all}")))
}

/// Sorts labels, as numbers where all of them are, and keeps one of each.
fn sort_labels(labels: &mut Vec<String>) {
    labels.sort();
    labels.dedup();
    let numbers: Option<Vec<f64>> =
        labels.iter().map(|l| l.parse::<f64>().ok().filter(|n| n.is_finite())).collect();
    if let Some(numbers) = numbers {
        let mut both: Vec<_> = numbers.into_iter().zip(std::mem::take(labels)).collect();
        both.sort_by(|a, b| a.0.total_cmp(&b.0));
        *labels = both.into_iter().map(|(_, label)| label).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::support::{grey, image, message, notes, save};
    use super::super::super::{DataOptions, Dataset, OnBadFile, open};
    use super::*;
    use std::fs;
    use tempfile::TempDir;

    /// Images 10.png, 9.png and 7.png, and a table.
    fn folder(table: &str) -> TempDir {
        let folder = TempDir::new().unwrap();
        for value in [7, 9, 10] {
            save(&folder, &format!("{value}.png"), grey(4, 4, value));
        }
        fs::write(folder.path().join("table.csv"), table).unwrap();
        folder
    }

    fn options(folder: &TempDir) -> DataOptions {
        let csv = CsvOptions {
            path: folder.path().join("table.csv"),
            id_column: None,
            extension: ".png".into(),
            label_column: None,
        };
        DataOptions { csv: Some(csv), ..DataOptions::default() }
    }

    fn with(folder: &TempDir, change: impl Fn(&mut CsvOptions)) -> Result<Box<dyn Dataset>> {
        let mut options = options(folder);
        change(options.csv.as_mut().unwrap());
        open(folder.path(), &options)
    }

    fn firsts(set: &dyn Dataset) -> Vec<u8> {
        (0..set.len()).map(|i| ((image(set, i)[0] + 1.0) * 127.5).round() as u8).collect()
    }

    #[test]
    fn the_table_says_which_images_and_in_which_order() {
        let folder = folder("id,boneage,male\n10,180,False\n7,12,True\n");
        let set = with(&folder, |_| ()).unwrap();
        assert_eq!((firsts(&*set), set.classes().len(), set.label(0)), (vec![10, 7], 0, None));
        assert!(notes(&*set).contains("2 images named by"), "{}", notes(&*set));
        let set = with(&folder, |csv| csv.label_column = Some("male".into())).unwrap();
        assert_eq!(set.classes(), ["False", "True"]);
        assert_eq!([set.label(0), set.label(1)], [Some(0), Some(1)]);
        // Numbers are sorted as numbers.
        let set = with(&folder, |csv| csv.label_column = Some("boneage".into())).unwrap();
        assert_eq!(set.classes(), ["12", "180"]);
        assert_eq!([set.label(0), set.label(1)], [Some(1), Some(0)]);
    }

    #[test]
    fn tables_are_written_in_many_ways() {
        for table in [
            "\u{feff}id,age\n10,1\n7,2\n",
            "id;age\r\n10;1\r\n7;2\r\n",
            "id\tage\n10\t1\n7\t2",
            "\"id\",\"age\"\n\"10\",1\n 7 ,2\n\n",
            "id\n10.png\n7.PNG\n",
        ] {
            let folder = folder(table);
            fs::copy(folder.path().join("7.png"), folder.path().join("7.PNG")).unwrap();
            assert_eq!(firsts(&*with(&folder, |_| ()).unwrap()), [10, 7], "{table:?}");
        }
        let folder = folder("age,Image Index\n3,9\n");
        let set = with(&folder, |csv| csv.id_column = Some("Image Index".into())).unwrap();
        assert_eq!(firsts(&*set), [9]);
    }

    #[test]
    fn a_missing_column_is_answered_with_those_there_are() {
        let folder = folder("id,boneage,male\n10,180,False\n");
        let text = message(with(&folder, |csv| csv.id_column = Some("ids".into())));
        assert!(
            text.contains("it has no column \"ids\" (data.csv_id_column); did you mean \"id\"; the"),
            "{text}"
        );
        assert!(text.contains("the columns are \"id\", \"boneage\", \"male\""), "{text}");
        let text = message(with(&folder, |csv| csv.label_column = Some("colour".into())));
        assert!(text.contains("no column \"colour\" (data.csv_label_column)"), "{text}");
        assert!(!text.contains("did you mean"), "{text}");
    }

    #[test]
    fn ids_without_a_file_are_all_listed_with_their_lines() {
        let folder = folder("id\n10\n11\n9\n../7\n");
        let text = message(with(&folder, |_| ()));
        assert!(text.contains("2 files cannot"), "{text}");
        assert!(text.contains("11.png: is not there (line 3 of table.csv)"), "{text}");
        assert!(text.contains("7.png: is outside of the folder (line 5 of table.csv)"), "{text}");
        let skip = DataOptions { on_bad_file: OnBadFile::Skip, ..options(&folder) };
        let set = open(folder.path(), &skip).unwrap();
        assert_eq!((firsts(&*set), set.summary().skipped.len()), (vec![10, 9], 2));
        // When not one is there it is the settings that are wrong.
        let text = message(with(&folder, |csv| csv.extension = ".jpg".into()));
        assert!(text.contains("none of the 4 images") && text.contains("data.csv_extension"), "{text}");
    }

    #[test]
    fn ids_given_twice_are_refused_with_their_lines() {
        let folder = folder("id\n10\n9\n10\n");
        let text = message(with(&folder, |_| ()));
        assert!(text.contains("table.csv: an id is given twice: 10 (lines 2 and 4)"), "{text}");
        // One image by two names.
        for other in ["10.png", "./10", "10.PNG"] {
            let folder = self::folder(&format!("id\n10\n9\n{other}\n"));
            let text = message(with(&folder, |_| ()));
            let twice = format!("an id is given twice: {other} (lines 2 and 4)");
            assert_eq!(text.contains(&twice), other != "10.PNG", "{text}");
        }
        let many: String = (0..9).map(|_| "10\n").collect();
        let text = message(with(&self::folder(&format!("id\n{many}")), |_| ()));
        assert!(
            text.contains("8 ids are given twice: 10 (lines 2 and 3)") && text.contains(" and so on"),
            "{text}"
        );
    }

    #[test]
    fn tables_that_are_none_are_refused() {
        for (table, expected) in [
            ("", "it has no header"),
            ("id,age\n", "a header and no rows"),
            ("id,age\n10,1\n,2\n", "line 3: the column \"id\" is empty"),
        ] {
            let text = message(with(&folder(table), |_| ()));
            assert!(text.contains(expected), "{expected}: {text}");
        }
        let folder = folder("id,age\n10,\n");
        let text = message(with(&folder, |csv| csv.label_column = Some("age".into())));
        assert!(text.contains("line 2: the column \"age\" is empty"), "{text}");
        fs::write(folder.path().join("table.csv"), b"id\n10\n\xff\n").unwrap();
        assert!(message(with(&folder, |_| ())).contains("line 3: it is no text in UTF-8"));
        assert!(
            message(with(&folder, |csv| csv.path = folder.path().join("no.csv")))
                .contains("read the CSV file")
        );
        assert!(message(with(&folder, |csv| csv.path = folder.path().into())).contains("it is no file"));
        assert!(message(open(&folder.path().join("7.png"), &options(&folder))).contains("give the folder"));
    }
}
