//! Long lists: the first lines are shown, and a file has all.

use ddpm::text::{LISTED, shown, thousands};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Files that were left out or cannot be read, each with its reason.
pub type Files = [(PathBuf, String)];

/// A line for each.
fn lines(files: &Files) -> impl Iterator<Item = String> {
    files.iter().map(|(path, reason)| format!("{}: {}", shown(path), ddpm::text::escaped(reason)))
}

/// The first lines, and how many more there are.
pub fn first_lines(files: &Files) -> Vec<String> {
    let more = (files.len() > LISTED).then(|| format!("and {} more", thousands(files.len() - LISTED)));
    lines(files).take(LISTED).chain(more).collect()
}

/// Writes the whole list, where it was not shown whole, and says where: into `folder`, or where there is none to a file of its own
/// among the system's temporary ones.
pub fn write_all(files: &Files, folder: Option<&Path>) -> Option<String> {
    if files.len() <= LISTED {
        return None;
    }
    let text: String = lines(files).map(|line| line + "\n").collect();
    let written = match folder {
        Some(folder) => {
            let path = folder.join("left-out.txt");
            ddpm::train::write_file(&path, text.as_bytes(), "write the list").ok().map(|()| path)
        }
        None => write_temporary(&text),
    };
    // A list is a help: where it cannot be written, there are other ways to it.
    Some(match written {
        Some(path) => format!("all {} are listed in {}", thousands(files.len()), shown(path)),
        None => "`ddpm data check FOLDER --all` lists all of them".to_owned(),
    })
}

fn write_temporary(text: &str) -> Option<PathBuf> {
    let mut file = tempfile::Builder::new().prefix("ddpm-files-").suffix(".txt").tempfile().ok()?;
    file.write_all(text.as_bytes()).ok()?;
    file.keep().ok().map(|(_, path)| path)
}
