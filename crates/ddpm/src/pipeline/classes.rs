//! The classes of a conditional network: their names and indices.

use super::Pipeline;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::plot;
use crate::text::{LISTED, escaped, listed};
use ddpm_text::nearest;

impl Pipeline {
    /// Number of classes that the network is conditioned on; `None` if it takes none.
    pub fn classes(&self) -> Option<u32> {
        let classes = self.config.build_network(self.shape.channels).classes();
        classes.map(|n| u32::try_from(n).unwrap_or(u32::MAX))
    }

    /// The class names by index; empty if the network takes no classes or they are unknown (imported
    /// weights).
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// The name of a class, or `#3` if it is unknown.
    pub fn class_name(&self, class: u32) -> String {
        self.class_names
            .get(class as usize)
            .map_or_else(|| format!("#{class}"), |name| escaped(name).into_owned())
    }

    /// Finds a class by name, or by index when given as `#3`. A plain number is a name, and an index only if
    /// the names are unknown.
    ///
    /// # Errors
    /// [`Error::Config`] listing the classes of the run.
    pub fn class(&self, name: &str) -> Result<u32> {
        let invalid = |reason: String| Err(Error::Config { key: "class".to_owned(), reason });
        let Some(n) = self.classes() else {
            return invalid("the run was trained without classes; leave it out".to_owned());
        };
        let index = name.strip_prefix('#').filter(|digits| digits.parse::<u32>().is_ok());
        let matches = |own: &&String| index.is_none() && *own == name;
        let found = || (0u32..).zip(&self.class_names).filter(|(_, own)| matches(own)).map(|(i, _)| i);
        let (first, second) = (found().next(), found().nth(1));
        match (first, second) {
            (Some(only), None) => return Ok(only),
            (Some(a), Some(b)) => {
                let name = escaped(name);
                return invalid(format!(
                    "several classes are named \"{name}\"; give the index: --class=#{a} or --class=#{b}"
                ));
            }
            _ => {}
        }
        let index = index.or(self.class_names.is_empty().then_some(name));
        match index.and_then(|text| text.parse::<u32>().ok()) {
            Some(class) if class < n => Ok(class),
            Some(_) => invalid(format!(
                "there is no class at the index {}: indices go from 0 to {}",
                escaped(name),
                n - 1
            )),
            None => invalid(self.no_such_class(name, n)),
        }
    }

    /// The message for an unknown class name, with suggestions.
    fn no_such_class(&self, name: &str, n: u32) -> String {
        let number = |text: &str| text.trim().parse::<f64>().ok();
        let names = || self.class_names.iter().map(String::as_str);
        // Numbers match by value, however they are written; other names by spelling.
        let near = match number(name) {
            Some(_) => names().find(|own| number(own) == number(name)),
            None => nearest(name, names()),
        };
        let suggestion =
            near.map_or("; the".to_owned(), |near| format!("; did you mean \"{}\"? The", escaped(near)));
        let by_index = match name.parse::<u32>() {
            Ok(index) if index < n => {
                format!(
                    "; the class at the index {index} is \"{}\": --class=#{index}",
                    self.class_name(index)
                )
            }
            _ => String::new(),
        };
        format!(
            "there is no class \"{}\"{suggestion} run has {}{by_index}",
            escaped(name),
            self.describe_classes(n)
        )
    }

    /// The network's class index for each class of a data set: that of the class with the same name, or the
    /// data set's own if the names are unknown (imported weights). Empty if either side has no classes.
    ///
    /// # Errors
    /// [`Error::Data`] for classes that the run does not have.
    pub fn class_indices(&self, data: &dyn Dataset) -> Result<Vec<u32>> {
        let (Some(n), names) = (self.classes(), data.classes()) else { return Ok(Vec::new()) };
        let invalid = |reason| Error::Data { path: data.summary().source.clone().into(), reason };
        if self.class_names.is_empty() {
            if !names.is_empty() && names.len() != n as usize {
                let reason = format!("has {} classes, but the run has {n}, with unknown names", names.len());
                return Err(invalid(reason));
            }
            return Ok((0..names.len() as u32).collect());
        }
        let index = |name: &String| {
            let at = self.class_names.iter().position(|n| n == name);
            at.and_then(|i| u32::try_from(i).ok()).ok_or_else(|| {
                invalid(format!(
                    "has a class \"{}\"; the run has {}; rename the data's classes to match",
                    escaped(name),
                    self.describe_classes(n)
                ))
            })
        };
        names.iter().map(index).collect()
    }

    /// Describes the classes: by name, or as a range if the names are just the indices.
    pub(super) fn describe_classes(&self, n: u32) -> String {
        if self.class_names.iter().enumerate().all(|(i, name)| *name == i.to_string()) {
            return format!("the classes 0 to {}", n - 1);
        }
        let names: Vec<_> = self.class_names.iter().map(|name| escaped(name)).collect();
        format!("the classes {}", listed(&names, LISTED))
    }

    /// The label of class `n` in plots: its name, prefixed with the index if the plot font lacks its letters;
    /// only the index if the names are unknown (imported weights).
    pub fn class_label(&self, n: u32) -> String {
        match self.class_names.get(n as usize) {
            Some(name) if plot::can_write(name) => name.clone(),
            Some(name) => format!("#{n} {name}"),
            None => n.to_string(),
        }
    }
}
