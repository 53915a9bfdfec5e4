//! Names from outside in messages, commands and names of files.
//!
//! A file's name may hold anything: sequences that steer a terminal, newlines that fake a line of a report, marks that
//! turn the direction of writing. [`escaped`] and [`shown`] write such characters as escapes.

use std::borrow::Cow;
use std::fmt::Write;
use std::path::Path;

use sha2::{Digest, Sha256};

/// Lines of a long list that are shown.
pub const LISTED: usize = 20;

/// Whether `c` is shown as an escape: control characters, separators of lines, marks and overrides of the direction of
/// writing, and spaces of no width. Joiners stay: scripts and emoji need them.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'
            | '\u{2066}'..='\u{2069}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
}

fn push_escaped(out: &mut String, c: char) {
    // Writing to a String cannot fail.
    let _ = match c {
        '\n' | '\r' | '\t' => write!(out, "{}", c.escape_default()),
        c if c.is_ascii() => write!(out, "\\x{:02x}", u32::from(c)),
        c => write!(out, "\\u{{{:x}}}", u32::from(c)),
    };
}

fn escape(text: &str, kept: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.chars().any(|c| is_unsafe(c) && !kept(c)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_unsafe(c) && !kept(c) { push_escaped(&mut out, c) } else { out.push(c) }
    }
    Cow::Owned(out)
}

/// `text` as one line that does nothing to a terminal: control characters as `\n`, `\x1b` or `\u{202e}`.
pub fn escaped(text: &str) -> Cow<'_, str> {
    escape(text, |_| false)
}

/// A message of several lines that does nothing else to a terminal.
pub fn escaped_lines(text: &str) -> Cow<'_, str> {
    escape(text, |c| c == '\n')
}

/// The name in a message: [`escaped`], bytes that are no UTF-8 as `\xe9`.
pub fn shown(path: impl AsRef<Path>) -> String {
    let mut out = String::new();
    for chunk in path.as_ref().as_os_str().as_encoded_bytes().utf8_chunks() {
        out += &escaped(chunk.valid());
        chunk.invalid().iter().for_each(|byte| {
            let _ = write!(out, "\\x{byte:02x}");
        });
    }
    out
}

/// The path as a word of a command that can be copied into a shell: quoted where it must be.
pub fn quoted(path: impl AsRef<Path>) -> String {
    let bytes = path.as_ref().as_os_str().as_encoded_bytes();
    // What begins with a dash would be a flag.
    if bytes.starts_with(b"-") { quoted_bytes(&[b"./", bytes].concat()) } else { quoted_bytes(bytes) }
}

/// [`quoted`] for a value that is no path, behind its flag: `--class=NAME`.
pub fn quoted_value(text: &str) -> String {
    quoted_bytes(text.as_bytes())
}

fn quoted_bytes(bytes: &[u8]) -> String {
    if let Ok(text) = str::from_utf8(bytes)
        && !text.chars().any(is_unsafe)
    {
        return quoted_text(text);
    }
    // bash, zsh and POSIX of 2024 read escapes between $' and '.
    let mut out = "$'".to_owned();
    let escape = |out: &mut String, bytes: &[u8]| {
        bytes.iter().for_each(|byte| {
            let _ = write!(out, "\\{byte:03o}");
        });
    };
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\'' | '\\' => out.extend(['\\', c]),
                c if !is_unsafe(c) => out.push(c),
                c => escape(&mut out, c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        escape(&mut out, chunk.invalid());
    }
    out + "'"
}

/// Text without control characters as a word for a shell.
fn quoted_text(text: &str) -> String {
    if cfg!(windows) {
        let bare = |c: char| c.is_alphanumeric() || "-_.:=/\\+,@".contains(c);
        return if !text.is_empty() && text.chars().all(bare) {
            text.to_owned()
        } else {
            format!("\"{text}\"")
        };
    }
    // It refuses only NUL, which no path has.
    shlex::try_quote(text).map_or_else(|_| escaped(text).into_owned(), Cow::into_owned)
}

/// The first of `items`, joined, and how many more there are.
pub fn listed<S: AsRef<str>>(items: &[S], most: usize) -> String {
    let mut text = items.iter().take(most).map(AsRef::as_ref).collect::<Vec<_>>().join(", ");
    if items.len() > most {
        // Writing to a String cannot fail.
        let _ = write!(text, " and {} more", thousands(items.len() - most));
    }
    text
}

/// `1 image`, `1,234 images`: so many of what `noun` names.
pub fn counted(n: usize, noun: &str) -> String {
    format!("{} {noun}{}", thousands(n), if n == 1 { "" } else { "s" })
}

/// `1,234,567`.
pub fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `name` in at most `most` bytes, as file systems ask for: a longer one is cut between characters and ends with a hash of
/// the whole, so that different names stay different.
///
/// # Panics
/// If `most` is below 16.
pub fn capped(name: &str, most: usize) -> Cow<'_, str> {
    assert!(most >= 16);
    if name.len() <= most {
        return Cow::Borrowed(name);
    }
    let hash: String = Sha256::digest(name).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let kept = name.floor_char_boundary(most - hash.len() - 1);
    Cow::Owned(format!("{}-{hash}", &name[..kept]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_name_steers_a_terminal() {
        for (name, expected) in [
            ("plain name.png", "plain name.png"),
            ("né à 東京 👩\u{200d}🎨.png", "né à 東京 👩\u{200d}🎨.png"),
            ("a\x1b[31mred\x07", "a\\x1b[31mred\\x07"),
            ("a\nb\r\tc", "a\\nb\\r\\tc"),
            ("gnp.\u{202e}exe", "gnp.\\u{202e}exe"),
            ("\u{9b}31m\u{7f}\u{2028}\u{2066}x\u{feff}", "\\u{9b}31m\\x7f\\u{2028}\\u{2066}x\\u{feff}"),
        ] {
            assert_eq!(escaped(name), expected);
            assert_eq!(shown(name), expected);
        }
        assert_eq!(escaped_lines("one\ntwo\x1b"), "one\ntwo\\x1b");
    }

    #[cfg(unix)]
    #[test]
    fn names_that_are_no_utf8_are_told_apart() {
        use std::os::unix::ffi::OsStrExt;
        let name = |bytes: &'static [u8]| std::ffi::OsStr::from_bytes(bytes);
        assert_eq!(shown(name(b"caf\xe9\n")), "caf\\xe9\\n");
        assert_eq!(quoted(name(b"caf\xe9's")), "$'caf\\351\\'s'");
    }

    #[cfg(unix)]
    #[test]
    fn commands_can_be_copied_into_a_shell() {
        assert_eq!(quoted("runs/run-001"), "runs/run-001");
        assert_eq!(quoted("-x"), "./-x");
        for name in ["my photos", "it's", "a$HOME`ls`", "*", "a\nb\x1b[1m", "say \"hi\"", "\\t", "é\u{202e}'"]
        {
            let script = format!("printf %s {}", quoted(name));
            let run = std::process::Command::new("bash").args(["-c", &script]).output();
            // Where there is no bash there is nothing to ask.
            let Ok(run) = run else { return };
            assert_eq!(String::from_utf8(run.stdout).unwrap(), name, "{script}");
        }
    }

    #[test]
    fn long_names_are_cut_between_characters_and_stay_different() {
        assert_eq!(capped("short", 16), "short");
        let (a, b) = ("é".repeat(200) + "a", "é".repeat(200) + "b");
        for most in 16..60 {
            let (a, b) = (capped(&a, most), capped(&b, most));
            assert!(a.len() <= most && a.len() >= most - 1 && a != b, "{a} {b}");
        }
    }

    #[test]
    fn long_lists_end_with_a_count() {
        let items: Vec<String> = (0..5000).map(|i| i.to_string()).collect();
        assert_eq!(listed(&items, 3), "0, 1, 2 and 4,997 more");
        assert_eq!(listed(&items[..2], 3), "0, 1");
        assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
    }
}
