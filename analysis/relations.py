"""Pairs of words in fourteen relations, for the parallelogram loss of `analysis.geometry`.

The words are common ones, so most of them are in a small vocabulary.
"""

RELATIONS = {
    "country: capital": "France:Paris England:London Germany:Berlin Italy:Rome Spain:Madrid"
    " Russia:Moscow Japan:Tokyo",
    "country: people": "France:French England:English Germany:German Italy:Italian Spain:Spanish"
    " Russia:Russian Japan:Japanese",
    "man: woman": "man:woman king:queen he:she his:her father:mother son:daughter brother:sister"
    " husband:wife actor:actress",
    "one: many": "year:years city:cities game:games song:songs film:films book:books member:members"
    " village:villages",
    "now: then": "is:was are:were has:had make:made take:took write:wrote begin:began become:became"
    " know:knew",
    "do: doing": "play:playing work:working make:making build:building write:writing live:living"
    " run:running sing:singing",
    "he: does": "play:plays work:works live:lives make:makes run:runs write:writes become:becomes"
    " include:includes",
    "adjective: adverb": "large:largely local:locally general:generally high:highly near:nearly"
    " particular:particularly final:finally",
    "good: better": "good:better large:larger small:smaller high:higher low:lower great:greater"
    " old:older long:longer",
    "good: best": "good:best large:largest small:smallest high:highest low:lowest great:greatest"
    " old:oldest long:longest",
    "opposites": "north:south east:west first:last old:new large:small high:low early:late"
    " black:white open:closed",
    "number: order": "one:first two:second three:third four:fourth five:fifth six:sixth"
    " seven:seventh eight:eighth",
    "person: deed": "writer:write player:play singer:sing leader:lead teacher:teach driver:drive"
    " director:direct",
    "month: next": "January:February February:March March:April April:May June:July July:August"
    " August:September October:November",
}


def pairs(relation: str) -> list[tuple[str, str]]:
    """The pairs of words of a relation, by its name in RELATIONS."""
    found = []
    for pair in RELATIONS[relation].split():
        first, second = pair.split(":")
        found.append((first, second))
    return found
