//! A heat map of values relative to a limit.

use super::{GRID, INK, PlotResult, SCALE, TEXT, TITLE, render, text, text_width};
use crate::error::{Error, Result};
use crate::image::Image;
use plotters::element::{PathElement, Rectangle};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, RGBColor, WHITE};

/// Width and height of a cell in pixels, and font size of its value.
const CELL: (usize, usize) = (32, 17);
const CELL_TEXT: u32 = 11;
/// Pixels between column groups, around the plot, and between labels and rows.
const GAP: usize = 8;
const MARGIN: usize = 14;
const SPACE: usize = 6;
/// Width of a legend entry in pixels.
const LEGEND: usize = 115;
/// Heights of the title, the legend, the group names and the column names.
const LINES: [usize; 4] = [28, 30, 22, 20];
/// Colours at 0 and at 1, interpolated between; then above 1, and from 2.
const RAMP: [RGBColor; 2] = [RGBColor(247, 250, 255), RGBColor(33, 113, 181)];
const OVER_LIMIT: [RGBColor; 2] = [RGBColor(222, 75, 40), RGBColor(120, 0, 15)];
/// Colour of a missing value.
const MISSING: RGBColor = RGBColor(205, 205, 205);

/// A named group of columns.
#[derive(Clone, Debug)]
pub struct Columns {
    /// The name.
    pub name: String,
    /// The names of the columns.
    pub each: Vec<String>,
}

/// A named row with a value per column; a missing value is shown as a crossed-out cell.
#[derive(Clone, Debug)]
pub struct Row {
    /// The name.
    pub name: String,
    /// The values.
    pub values: Vec<Option<f64>>,
}

fn colour(value: Option<f64>) -> RGBColor {
    let Some(value) = value else { return MISSING };
    if value > 1.0 || value.is_nan() {
        return OVER_LIMIT[usize::from(value >= 2.0 || value.is_nan())];
    }
    let mix = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * value.max(0.0)) as u8;
    let [low, high] = RAMP;
    RGBColor(mix(low.0, high.0), mix(low.1, high.1), mix(low.2, high.2))
}

/// Formats a value to fit into a cell.
fn format_value(value: f64) -> String {
    match value {
        v if v < 9.995 => format!("{v:.2}"),
        v if v < 999.5 => format!("{v:.0}"),
        _ => ">999".to_owned(),
    }
}

/// Draws a heat map of non-negative values relative to a limit of 1: smaller values are lighter, and values above 1
/// have another colour. `none` describes missing values in the legend.
///
/// # Errors
/// [`Error::Plot`]; also if a row does not have a value per column.
pub fn heat_map(title: &str, none: &str, columns: &[Columns], rows: &[Row]) -> Result<Image> {
    let count: usize = columns.iter().map(|group| group.each.len()).sum();
    if rows.iter().any(|row| row.values.len() != count) {
        return Err(Error::Plot { reason: "a row has too few or too many values".to_owned() });
    }
    let label = rows.iter().map(|row| text_width(&row.name, TEXT)).max().unwrap_or(0);
    let (left, top) = (MARGIN + label + SPACE, MARGIN + LINES.iter().sum::<usize>());
    // Left edge of each column, with gaps between groups.
    let mut places = Vec::with_capacity(count);
    let mut at = left;
    let mut starts = Vec::new();
    for group in columns {
        starts.push(at);
        places.extend((0..group.each.len()).map(|i| at + i * CELL.0));
        at += group.each.len() * CELL.0 + GAP;
    }
    let legend = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0].map(Some);
    let legend_width = (legend.len() + 1) * LEGEND + text_width(none, TEXT);
    let wide = at.max(left + text_width(title, TITLE)).max(MARGIN + legend_width) + MARGIN;
    let high = top + rows.len() * CELL.1 + MARGIN;
    let (Ok(wide), Ok(high)) = (u32::try_from(wide), u32::try_from(high)) else {
        return Err(Error::Plot { reason: "the table is too large for a plot".to_owned() });
    };
    let scaled = |x: usize, y: usize| (x as i32 * SCALE as i32, y as i32 * SCALE as i32);
    render(wide, high, |area| {
        let draw_text = |words: &str, size, (horizontal, vertical), place| -> PlotResult {
            Ok(area.draw_text(words, &text(size).pos(Pos::new(horizontal, vertical)), place)?)
        };
        let cell = |x: usize, y: usize, value: Option<f64>| -> PlotResult {
            let corners = [scaled(x, y), scaled(x + CELL.0, y + CELL.1)];
            area.draw(&Rectangle::new(corners, colour(value).filled()))?;
            area.draw(&Rectangle::new(corners, GRID.stroke_width(1)))?;
            if value.is_none() {
                let ends = [scaled(x + 8, y + CELL.1 - 4), scaled(x + CELL.0 - 8, y + 4)];
                area.draw(&PathElement::new(ends, INK.mix(0.5).stroke_width(SCALE)))?;
            }
            Ok(())
        };
        draw_text(title, TITLE, (HPos::Left, VPos::Top), scaled(MARGIN, MARGIN))?;
        let line = MARGIN + LINES[0];
        for (i, value) in legend.into_iter().chain([None]).enumerate() {
            let x = MARGIN + i * LEGEND;
            cell(x, line, value)?;
            let words = value.map_or(none.to_owned(), |v| match v {
                2.0 => "2 or more".to_owned(),
                1.0 => "1: limit".to_owned(),
                v => v.to_string(),
            });
            draw_text(&words, TEXT, (HPos::Left, VPos::Center), scaled(x + CELL.0 + 4, line + CELL.1 / 2))?;
        }
        let line = line + LINES[1] + LINES[2];
        for (group, &start) in columns.iter().zip(&starts) {
            draw_text(&group.name, TEXT, (HPos::Left, VPos::Bottom), scaled(start, line - 2))?;
        }
        let names = columns.iter().flat_map(|group| &group.each);
        for (name, &x) in names.zip(&places) {
            draw_text(name, CELL_TEXT, (HPos::Center, VPos::Bottom), scaled(x + CELL.0 / 2, top - 2))?;
        }
        for (i, row) in rows.iter().enumerate() {
            let y = top + i * CELL.1;
            draw_text(&row.name, TEXT, (HPos::Right, VPos::Center), scaled(left - SPACE, y + CELL.1 / 2))?;
            for (&value, &x) in row.values.iter().zip(&places) {
                cell(x, y, value)?;
                let Some(value) = value else { continue };
                let ink = if value > 0.6 { WHITE } else { INK };
                let style = text(CELL_TEXT).pos(Pos::new(HPos::Center, VPos::Center)).color(&ink);
                area.draw_text(&format_value(value), &style, scaled(x + CELL.0 / 2, y + CELL.1 / 2))?;
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_coloured_by_value() {
        let columns =
            ["a", "b"].map(|name| Columns { name: name.to_owned(), each: vec!["10".to_owned(); 2] });
        let row = |values: [Option<f64>; 4]| Row { name: "a row".to_owned(), values: values.to_vec() };
        let made =
            heat_map("title", "refused", &columns, &[row([Some(0.3), Some(1.2), Some(1e9), None])]).unwrap();
        let count = |value| {
            let RGBColor(r, g, b) = colour(value);
            made.data.chunks(3).filter(|p| **p == [r, g, b]).count()
        };
        // The text covers less than half of a cell.
        for value in [Some(0.3), Some(1.2), Some(1e9), None] {
            assert!(count(value) > CELL.0 * CELL.1 / 2, "{value:?}: {}", count(value));
        }
        assert_eq!(count(Some(0.4)), 0);
        assert_eq!(colour(Some(f64::NAN)), colour(Some(f64::INFINITY)));
        let format_value = Row { name: String::new(), values: vec![None] };
        assert!(matches!(heat_map("", "", &columns, &[format_value]), Err(Error::Plot { .. })));
        assert!(heat_map("", "", &[], &[]).is_ok());
    }
}
