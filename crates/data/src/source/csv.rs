//! A CSV file with one id per row, and a folder with one image per id: the format of the RSNA bone-age data set.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Component, Path};

use csv::{ReaderBuilder, StringRecord};

use super::super::options::CsvOptions;
use super::super::unusable;
use super::{DataContent, Entry, Files, Store};
use crate::error::{Error, Result};
use ddpm_text::nearest;
use ddpm_text::{LISTED, counted, escaped, listed, shown};

/// Maximum number of duplicate ids listed in an error.
const MAX_SHOWN: usize = 5;
/// Maximum file size in bytes.
const MAX_FILE: u64 = 32 << 20;

/// A row of the table.
struct Row {
    /// The image's file name.
    name: String,
    /// Its class.
    label: Option<String>,
    /// Its line in the file, from 1.
    line: u64,
}

/// The images in `folder` that `table` lists, in the order of its rows.
pub(super) fn read(folder: &Path, table: &CsvOptions) -> Result<DataContent> {
    let path = &table.path;
    let (rows, id_column) = rows(table)?;
    let mut classes: Vec<String> = rows.iter().filter_map(|row| row.label.clone()).collect();
    sort_labels(&mut classes);
    let class_indices: HashMap<&str, u32> = classes.iter().map(String::as_str).zip(0..).collect();
    let (mut entries, mut bad) = (Vec::new(), Vec::new());
    for Row { name, label, line } in rows {
        let file = folder.join(&name);
        let table = shown(path.file_name().unwrap_or_default());
        if !Path::new(&name).components().all(|part| matches!(part, Component::Normal(_))) {
            bad.push((file, format!("is outside the folder (line {line} of {table})")));
        } else if !file.exists() {
            bad.push((file, format!("does not exist (line {line} of {table})")));
        } else {
            let label = label.and_then(|l| class_indices.get(l.as_str()).copied());
            entries.push(Entry { path: file, name: name.into_bytes(), label, at: 0 });
        }
    }
    let mut notes = vec![format!("{} listed in {}", counted(entries.len(), "image"), shown(path))];
    if entries.is_empty() {
        let reason = format!(
            "none of the {} images listed in {} exists, for example {}; check data.path (the image folder), \
             data.csv_extension ({:?}, appended to each id) and the id column {id_column:?}",
            bad.len(),
            shown(path),
            shown(&bad[0].0),
            table.extension,
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
    Ok(DataContent { source, classes, sorted: true, notes, bad })
}

/// The rows of the table, at least one, and the name of its id column.
fn rows(table: &CsvOptions) -> Result<(Vec<Row>, String)> {
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
    let (mut duplicates, mut num_duplicates) = (Vec::new(), 0usize);
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
                num_duplicates += 1;
                if duplicates.len() < MAX_SHOWN {
                    duplicates.push(format!("{} (lines {first} and {line})", escaped(&id)));
                }
            }
            None => {
                lines.insert(name.clone(), line);
                rows.push(Row { name, label, line });
            }
        }
    }
    if !duplicates.is_empty() {
        return Err(wrong(format!(
            "{} given more than once: {}{}; each image may have only one row",
            if num_duplicates == 1 { "an id is".to_owned() } else { format!("{num_duplicates} ids are") },
            duplicates.join(", "),
            if num_duplicates > duplicates.len() { " and others" } else { "" }
        )));
    }
    if rows.is_empty() {
        return Err(wrong("it has a header but no rows".into()));
    }
    Ok((rows, header[ids].to_owned()))
}

/// The file name of an id: with the extension, unless the id already has it, and without a leading `./`.
fn file_name(id: &str, extension: &str) -> String {
    let id = id.strip_prefix("./").unwrap_or(id);
    if id.to_lowercase().ends_with(&extension.to_lowercase()) {
        id.to_owned()
    } else {
        format!("{id}{extension}")
    }
}

fn text(path: &Path) -> Result<String> {
    let io = |e| Error::io(path, "read the CSV file (data.csv)")(e);
    let metadata = std::fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return Err(unusable(
            path,
            "it is not a regular file; data.csv is the CSV file, data.path the image folder",
        ));
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path).map_err(io)?.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(unusable(path, format!("it is longer than {} MiB", MAX_FILE >> 20)));
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let line = e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
        unusable(path, format!("line {line}: it is not valid UTF-8; save the CSV file as UTF-8"))
    })?;
    // Spreadsheets prepend a byte order mark.
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

/// The column delimiter: a comma, unless the header has none but has semicolons or tabs.
fn delimiter(text: &str) -> u8 {
    let header = text.lines().next().unwrap_or_default();
    // Delimiters inside quotes are part of a name.
    let bare: String = header.split('"').step_by(2).collect();
    [b',', b';', b'\t'].into_iter().find(|&d| bare.as_bytes().contains(&d)).unwrap_or(b',')
}

/// The index of the column `name`, as set by `key`.
fn column(path: &Path, header: &StringRecord, key: &str, name: &str) -> Result<usize> {
    let names = || header.iter().map(str::trim);
    if let Some(at) = names().position(|n| n == name) {
        return Ok(at);
    }
    let hint = nearest(name, names()).map_or(String::new(), |near| format!("; did you mean {near:?}"));
    let all = listed(&names().map(|n| format!("{n:?}")).collect::<Vec<_>>(), LISTED);
    Err(unusable(path, format!("it has no column {name:?} (data.{key}){hint}; the columns are {all}")))
}

/// Sorts labels (numerically if all of them are numbers) and removes duplicates.
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
    use super::super::super::test_util::{grey, image, message, notes, save};
    use super::super::super::{DataOptions, Dataset, OnBadFile, open};
    use super::*;
    use std::fs;
    use tempfile::TempDir;

    /// A folder with the images 10.png, 9.png and 7.png, and a table.
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
    fn the_table_selects_and_orders_the_images() {
        let folder = folder("id,boneage,male\n10,180,False\n7,12,True\n");
        let set = with(&folder, |_| ()).unwrap();
        assert_eq!((firsts(&*set), set.classes().len(), set.label(0)), (vec![10, 7], 0, None));
        assert!(notes(&*set).contains("2 images listed in"), "{}", notes(&*set));
        let set = with(&folder, |csv| csv.label_column = Some("male".into())).unwrap();
        assert_eq!(set.classes(), ["False", "True"]);
        assert_eq!([set.label(0), set.label(1)], [Some(0), Some(1)]);
        // Numeric labels sort numerically.
        let set = with(&folder, |csv| csv.label_column = Some("boneage".into())).unwrap();
        assert_eq!(set.classes(), ["12", "180"]);
        assert_eq!([set.label(0), set.label(1)], [Some(1), Some(0)]);
    }

    #[test]
    fn common_csv_dialects_are_read() {
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
    fn the_error_for_a_missing_column_lists_the_columns() {
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
    fn ids_without_a_file_are_listed_with_their_lines() {
        let folder = folder("id\n10\n11\n9\n../7\n");
        let text = message(with(&folder, |_| ()));
        assert!(text.contains("2 files cannot"), "{text}");
        assert!(text.contains("11.png: does not exist (line 3 of table.csv)"), "{text}");
        assert!(text.contains("7.png: is outside the folder (line 5 of table.csv)"), "{text}");
        let skip = DataOptions { on_bad_file: OnBadFile::Skip, ..options(&folder) };
        let set = open(folder.path(), &skip).unwrap();
        assert_eq!((firsts(&*set), set.summary().skipped.len()), (vec![10, 9], 2));
        // If none exists, the settings must be wrong.
        let text = message(with(&folder, |csv| csv.extension = ".jpg".into()));
        assert!(text.contains("none of the 4 images") && text.contains("data.csv_extension"), "{text}");
    }

    #[test]
    fn duplicate_ids_are_rejected_with_their_lines() {
        let folder = folder("id\n10\n9\n10\n");
        let text = message(with(&folder, |_| ()));
        assert!(text.contains("table.csv: an id is given more than once: 10 (lines 2 and 4)"), "{text}");
        // Two names for one image.
        for other in ["10.png", "./10", "10.PNG"] {
            let folder = self::folder(&format!("id\n10\n9\n{other}\n"));
            let text = message(with(&folder, |_| ()));
            let duplicate = format!("an id is given more than once: {other} (lines 2 and 4)");
            assert_eq!(text.contains(&duplicate), other != "10.PNG", "{text}");
        }
        let many: String = (0..9).map(|_| "10\n").collect();
        let text = message(with(&self::folder(&format!("id\n{many}")), |_| ()));
        assert!(
            text.contains("8 ids are given more than once: 10 (lines 2 and 3)")
                && text.contains(" and others"),
            "{text}"
        );
    }

    #[test]
    fn invalid_tables_are_rejected() {
        for (table, expected) in [
            ("", "it has no header"),
            ("id,age\n", "a header but no rows"),
            ("id,age\n10,1\n,2\n", "line 3: the column \"id\" is empty"),
        ] {
            let text = message(with(&folder(table), |_| ()));
            assert!(text.contains(expected), "{expected}: {text}");
        }
        let folder = folder("id,age\n10,\n");
        let text = message(with(&folder, |csv| csv.label_column = Some("age".into())));
        assert!(text.contains("line 2: the column \"age\" is empty"), "{text}");
        fs::write(folder.path().join("table.csv"), b"id\n10\n\xff\n").unwrap();
        assert!(message(with(&folder, |_| ())).contains("line 3: it is not valid UTF-8"));
        assert!(
            message(with(&folder, |csv| csv.path = folder.path().join("no.csv")))
                .contains("read the CSV file")
        );
        assert!(
            message(with(&folder, |csv| csv.path = folder.path().into()))
                .contains("it is not a regular file")
        );
        assert!(message(open(&folder.path().join("7.png"), &options(&folder))).contains("give the folder"));
    }
}
