"""How layers look in QGIS: the table `layer_styles` of a GeoPackage, of which QGIS takes up the default by itself."""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from xml.sax.saxutils import quoteattr

from .answers import Source

# What is said of a tile: its name in the legend, the colour of its outline, and how much its inside covers, of 255.
CHANGES: Mapping[str, tuple[str, tuple[int, int, int], int]] = {
    "true": ("changed", (220, 30, 40), 60),
    "false": ("unchanged", (120, 120, 120), 0),
    "unknown": ("unknown", (70, 70, 70), 120),
}
_TABLE = """
CREATE TABLE layer_styles (
    id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, f_table_catalog TEXT(256), f_table_schema TEXT(256),
    f_table_name TEXT(256), f_geometry_column TEXT(256), styleName TEXT(30), styleQML TEXT, styleSLD TEXT,
    useAsDefault BOOLEAN, description TEXT, owner TEXT(30), ui TEXT(30), update_time DATETIME DEFAULT CURRENT_TIMESTAMP
)
"""
_INSERT = """
INSERT INTO layer_styles
    (f_table_catalog, f_table_schema, f_table_name, f_geometry_column, styleName, styleQML, useAsDefault)
VALUES ('', '', ?, ?, ?, ?, 1)
"""
_REGISTER = "INSERT INTO gpkg_contents (table_name, data_type, identifier) VALUES ('layer_styles', 'attributes', ?)"


def add_styles(path: Path, source: Source) -> None:
    """
    Adds the styles of the layers `tiles`, `cells` and `objects` to a GeoPackage.

    Args:
        path (`Path`): of the file.
        source ([`Source`]): of the scan, which says what cells and objects can be.
    """
    by_kind = _style("kind", {kind: (kind, colour, 90) for kind, colour in source.colours.items()})
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(_TABLE)
        database.execute(_REGISTER, ("layer_styles",))
        for layer, style in (("tiles", _style("changed", CHANGES)), ("cells", by_kind), ("objects", by_kind)):
            columns = "SELECT column_name FROM gpkg_geometry_columns WHERE table_name = ?"
            for (column,) in database.execute(columns, (layer,)).fetchall():
                database.execute(_INSERT, (layer, column, layer, style))


def _style(column: str, looks: Mapping[str, tuple[str, tuple[int, int, int], int]]) -> str:
    """QGIS's own form, QML: a colour for each value of a column."""
    categories, symbols = "", ""
    for number, (value, (label, colour, cover)) in enumerate(looks.items()):
        red_green_blue = ",".join(map(str, colour))
        categories += (
            f'<category render="true" symbol="{number}" value={quoteattr(value)} label={quoteattr(label)} '
            'type="string"/>'
        )
        symbols += (
            f'<symbol type="fill" name="{number}" alpha="1"><layer class="SimpleFill" enabled="1"><Option type="Map">'
            f'<Option name="color" type="QString" value="{red_green_blue},{cover}"/>'
            f'<Option name="outline_color" type="QString" value="{red_green_blue},255"/>'
            '<Option name="outline_width" type="QString" value="0.4"/><Option name="outline_width_unit" '
            'type="QString" value="MM"/><Option name="style" type="QString" value="solid"/></Option></layer></symbol>'
        )
    return (
        '<!DOCTYPE qgis PUBLIC "http://mrcc.com/qgis.dtd" "SYSTEM"><qgis version="3.22" '
        'styleCategories="Symbology"><renderer-v2 type="categorizedSymbol" forceraster="0" symbollevels="0" '
        f'attr="{column}"><categories>{categories}</categories><symbols>{symbols}</symbols></renderer-v2></qgis>'
    )
