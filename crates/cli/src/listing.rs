//! Long lists: the first lines are shown, a file holds all of them.

use ddpm::text::{LISTED, shown, thousands};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Skipped or unreadable files, each with the reason.
pub type Files = [(PathBuf, String)];

/// One line per file.
fn lines(files: &Files) -> impl Iterator<Item = String> {
    files.iter().map(|(path, reason)| format!("{}: {}", shown(path), ddpm::text::escaped(reason)))
}

/// The first lines, and the number of the rest.
pub fn first_lines(files: &Files) -> Vec<String> {
    let more = (files.len() > LISTED).then(|| format!("and {} more", thousands(files.len() - LISTED)));
    lines(files).take(LISTED).chain(more).collect()
}

/// If the list was not shown in full, writes it to `folder`, or to a new temporary file, and returns a line that says where.
pub fn write_all(files: &Files, folder: Option<&Path>) -> Option<String> {
    if files.len() <= LISTED {
        return None;
    }
    let text: String = lines(files).map(|line| line + "\n").collect();
    let written = match folder {
        Some(folder) => {
            let path = folder.join("left-out.txt");
            ddpm::storage::write_file(&path, text.as_bytes(), "write the list").ok().map(|()| path)
        }
        None => write_temp_file(&text),
    };
    // The list is a convenience: failing to write it is no error.
    Some(match written {
        Some(path) => format!("all {} are listed in {}", thousands(files.len()), shown(path)),
        None => "`ddpm data check FOLDER --all` lists all of them".to_owned(),
    })
}

fn write_temp_file(text: &str) -> Option<PathBuf> {
    let mut file = tempfile::Builder::new().prefix("ddpm-files-").suffix(".txt").tempfile().ok()?;
    file.write_all(text.as_bytes()).ok()?;
    file.keep().ok().map(|(_, path)| path)
}
