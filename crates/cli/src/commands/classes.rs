//! Which classes are drawn, in words.

use ddpm::generate::{Classes, Generator};
use ddpm::text::{LISTED, listed, thousands};

/// The word for a row of each class.
pub(super) const ALL: &str = "all";

/// Says which class images have, by name: a number that was given may be a name or an index.
pub(super) fn tell_class(generator: &Generator, class: Classes) {
    let Some(n) = generator.classes() else { return };
    // A name that also asks for something else must be asked for by its index.
    let hidden = match class {
        Classes::Rows(_) => Some(ALL.to_owned()),
        Classes::One(class) => Some(format!("#{class}")),
        _ => None,
    };
    let own =
        hidden.and_then(|name| Some((generator.class_names().iter().position(|own| *own == name)?, name)));
    if let Some((index, name)) = own.filter(|&(index, _)| class != Classes::One(index as u32)) {
        tell!("note: the class that is named \"{name}\" is --class=#{index}");
    }
    let names = || -> Vec<String> { (0..n).map(|class| generator.class_name(class)).collect() };
    match class {
        Classes::One(class) => match generator.class_names().is_empty() {
            true => tell!("class     #{class}, whose name is not known"),
            false => tell!("class     {} (#{class})", generator.class_name(class)),
        },
        Classes::Rows(_) => tell!("rows      {}, from the top", listed(&names(), LISTED)),
        Classes::Cycle => {
            tell!("classes   {} in turn: {}", thousands(n as usize), listed(&names(), LISTED));
        }
        Classes::Unlabelled => tell!("class     none given"),
    }
}
