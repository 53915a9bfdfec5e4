//! The one form that all images of a set can be given, and what to tell about it.

use std::collections::BTreeMap;
use std::path::Path;

use super::images::Seen;
use super::options::{Alpha, DataOptions, Resize};
use super::transform::enlarges;
use super::{Found, channels_name, count, shorten, unusable};
use crate::error::{Error, Result};
use crate::text::thousands;

/// The forms of the files, the most frequent first.
pub(super) fn tally(images: &[(usize, Seen)]) -> Vec<Found> {
    let mut counts = BTreeMap::new();
    for Found { height, width, channels, bits, .. } in images.iter().map(|(_, p)| p.facts.file) {
        *counts.entry((height, width, channels, bits)).or_insert(0) += 1;
    }
    let mut found: Vec<_> = counts
        .into_iter()
        .map(|((height, width, channels, bits), images)| Found { height, width, channels, bits, images })
        .collect();
    found.sort_by_key(|f| std::cmp::Reverse(f.images));
    found
}

/// The one size of all images.
pub(super) fn common_size(
    path: &Path,
    images: &[(usize, Seen)],
    options: &DataOptions,
    found: &[Found],
    notes: &mut Vec<String>,
) -> Result<(usize, usize)> {
    let mut counts = BTreeMap::new();
    for f in found {
        *counts.entry((f.height, f.width)).or_insert(0) += f.images;
    }
    let mut sizes: Vec<_> = counts.into_iter().collect();
    sizes.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
    let listed = shorten(
        &sizes.iter().map(|((h, w), n)| format!("{h}x{w} ({})", count(*n, "image"))).collect::<Vec<_>>(),
    );
    match options.size {
        None if sizes.len() == 1 => Ok(sizes[0].0),
        None => Err(unusable(
            path,
            format!(
                "the images have {} sizes{} (height x width): {listed}; --size H (or HxW) resizes them all",
                thousands(sizes.len()),
                range(&sizes)
            ),
        )),
        Some((h, w)) => {
            if sizes.len() > 1 {
                notes.push(format!(
                    "{} sizes found{} (height x width): {listed}",
                    thousands(sizes.len()),
                    range(&sizes)
                ));
            }
            let side = options.resize_side.filter(|_| options.resize == Resize::ShortSide);
            if sizes.iter().any(|&(size, _)| size != (h, w) || side.is_some_and(|s| s != size.0.min(size.1)))
            {
                let whom = if sizes.len() == 1 {
                    format!("the images are {}x{}: ", sizes[0].0.0, sizes[0].0.1)
                } else {
                    String::new()
                };
                let how = match (options.resize, options.resize_side, options.random_crop_scale) {
                    (Resize::Exact, _, _) => "both sides".to_owned(),
                    (Resize::ShortSide, Some(side), None) => {
                        format!("short side to {side}, then the middle cut out")
                    }
                    (Resize::ShortSide, Some(side), _) => format!("short side to {side}, then a random crop"),
                    (Resize::ShortSide, None, None) => "short side, then the middle cut out".to_owned(),
                    (Resize::ShortSide, None, _) => "a random crop".to_owned(),
                };
                notes.push(format!("{whom}every image is resized to {h}x{w} ({how})"));
            }
            let small = |p: &Seen| enlarges(p.facts.file.height, p.facts.file.width, options);
            let least = side.map_or(format!("{h}x{w}"), |s| format!("{s} pixels at the short side"));
            tell(images, notes, small, &format!("smaller than {least}, and enlarged"));
            Ok((h, w))
        }
    }
}

/// The least and the greatest sides, where there are too many sizes to name them all.
fn range(sizes: &[((usize, usize), usize)]) -> String {
    let sides = |f: fn(&(usize, usize)) -> usize| {
        let all = || sizes.iter().map(|(size, _)| f(size));
        Some((all().min()?, all().max()?))
    };
    match (sides(|s| s.0), sides(|s| s.1)) {
        (Some((h, most_h)), Some((w, most_w))) if sizes.len() > 5 => {
            format!(", {h} to {most_h} x {w} to {most_w}")
        }
        _ => String::new(),
    }
}

/// The channels that all images can be given without loss, or those asked for.
pub(super) fn common_channels(
    images: &[(usize, Seen)],
    options: &DataOptions,
    notes: &mut Vec<String>,
) -> Result<usize> {
    let own = |n: usize| images.iter().filter(|(_, p)| p.base.channels == n).count();
    // Grey with alpha and RGB without together need all four.
    let (colour, alpha) = (own(3) + own(4) > 0, own(2) + own(4) > 0);
    let needed = if colour { 3 } else { 1 } + usize::from(alpha);
    let channels = options.channels.unwrap_or(needed);
    let colour_files = images.iter().filter(|(_, p)| p.facts.file.channels >= 3).count();
    let grey_in_colour = images.iter().filter(|(_, p)| p.facts.grey_in_colour).count();
    if channels <= 2 {
        if grey_in_colour > 0 {
            notes.push(format!(
                "{} stored in colour, yet every pixel is grey: read as grey",
                are(grey_in_colour, images.len())
            ));
        }
        if colour_files > grey_in_colour {
            notes.push(format!(
                "{} in colour, made grey (luma)",
                are(colour_files - grey_in_colour, images.len())
            ));
        }
    } else {
        let grey = own(1) + own(2);
        if grey > 0 {
            notes.push(format!("{} grey, made {}", are(grey, images.len()), channels_name(channels)));
        }
    }
    tell(
        images,
        notes,
        |p| p.facts.opaque_alpha,
        "stored with an alpha channel that is opaque everywhere: it is dropped",
    );
    let laid = images.iter().filter(|(_, p)| p.facts.composited).count();
    if laid > 0 && options.alpha == Some(Alpha::Keep) {
        let reason = format!(
            "{} transparent in places, and {channels} channels have no room to keep that; use data.channels = {}, or \
             \"black\" or \"white\" to lay them on",
            are(laid, images.len()),
            channels + 1
        );
        return Err(Error::Config { key: "data.alpha".into(), reason });
    }
    let ground = if options.alpha == Some(Alpha::White) { "white" } else { "black" };
    let what = format!("transparent in places: laid on {ground} (--channels 2 or 4 keeps alpha)");
    tell(images, notes, |p| p.facts.composited, &what);
    Ok(channels)
}

pub(super) fn common_depth(images: &[(usize, Seen)], notes: &mut Vec<String>) -> u8 {
    let deep = images.iter().filter(|(_, p)| p.base.bits == 16).count();
    if deep > 0 && deep < images.len() {
        notes.push(format!("{} of 16 bits a sample, the others of 8", are(deep, images.len())));
    }
    if deep > 0 { 16 } else { 8 }
}

/// Notes how many images something holds for, if it does for any.
pub(super) fn tell(
    images: &[(usize, Seen)],
    notes: &mut Vec<String>,
    holds: impl Fn(&Seen) -> bool,
    what: &str,
) {
    let n = images.iter().filter(|(_, p)| holds(p)).count();
    if n > 0 {
        notes.push(format!("{} {what}", are(n, images.len())));
    }
}

/// "all 7 images are", "1 of 7 images is".
fn are(n: usize, of: usize) -> String {
    match n {
        _ if of == 1 => "the image is".to_owned(),
        _ if n == of => format!("all {of} images are"),
        1 => format!("1 of {of} images is"),
        _ => format!("{n} of {of} images are"),
    }
}
