//! Prints which classes are sampled.

use ddpm::pipeline::{Labels, Pipeline};
use ddpm::text::{LISTED, listed, thousands};

/// The value of `--class` for a row of each class.
pub(super) const ALL: &str = "all";

/// Prints the classes of the images by name: the value of `--class` may be a name or an index.
pub(super) fn print_class(pipeline: &Pipeline, class: Labels) {
    let Some(n) = pipeline.classes() else { return };
    // A class whose name has another meaning here must be selected by index.
    let hidden = match class {
        Labels::Grouped(_) => Some(ALL.to_owned()),
        Labels::Fixed(class) => Some(format!("#{class}")),
        _ => None,
    };
    let shadowed =
        hidden.and_then(|name| Some((pipeline.class_names().iter().position(|other| *other == name)?, name)));
    if let Some((index, name)) = shadowed.filter(|&(index, _)| class != Labels::Fixed(index as u32)) {
        status!("note: select the class named \"{name}\" with --class=#{index}");
    }
    let names = || -> Vec<String> { (0..n).map(|class| pipeline.class_name(class)).collect() };
    match class {
        Labels::Fixed(class) => {
            if pipeline.class_names().is_empty() {
                status!("class     #{class} (name unknown)")
            } else {
                status!("class     {} (#{class})", pipeline.class_name(class))
            }
        }
        Labels::Grouped(_) => status!("rows      {}, from the top", listed(&names(), LISTED)),
        Labels::Cycle => {
            status!("classes   {} in turn: {}", thousands(n as usize), listed(&names(), LISTED));
        }
        Labels::Unlabelled => status!("class     none"),
    }
}
