"""Text in a single-byte encoding is read in the one whose letters its language uses, and that is said."""

import pytest

from kiem.config.run import Source
from kiem.data.encodings import likeliest
from kiem.data.sources import read_documents

SENTENCES = {
    "cp1252": [
        "Le garçon a mangé très vite à l'école, où la fenêtre était ouverte.",
        "Die Straße führt über die Brücke zum großen Haus; schön wäre es, früh zu gehen.",
        "¿Dónde está el niño? Mañana comeremos aquí con mucha ilusión.",
        "A criança não comeu o pão; amanhã haverá mais opções.",
        "La città è più bella di così, perché c'è il sole.",
        "På ön växer små träd och gröna ängar.",
        "Rødgrød med fløde på det blå bord, så æd løs.",
        "Hyvää päivää, mitä kuuluu? Tämä on pitkä yö.",
        "Það er ekkert að frétta, en ég þarf að fara út í búð.",
        "Crème brûlée",
        "l'hôtel près de la forêt",
        "très",
        "café",
    ],
    "cp1250": [
        "Příliš žluťoučký kůň úpěl ďábelské ódy, a proto se všichni smáli.",
        "Zażółć gęślą jaźń, mówił chłopiec, który był głodny.",
        "Árvíztűrő tükörfúrógép, és a hölgy szép kertje őszi időben.",
        "Ţara este frumoasă şi oamenii sînt buni în această primăvară.",
        "Čovjek je došao kući s djecom, a žena već čeka šetnju.",
        "Kráľ mal troch synov, ktorí išli ďaleko do sveta a vždy sa vrátili šťastní.",
        "Dziękuję bardzo, do widzenia, świat jest piękny.",
    ],
    "cp1254": ["Güneş doğuyor ve çocuklar okula gidiyor, ışık çok güzel."],
}
CASES = [(encoding, text) for encoding, texts in SENTENCES.items() for text in texts]


@pytest.mark.parametrize(("encoding", "text"), CASES, ids=[text[:20] for _, text in CASES])
def test_the_letters_of_a_language_decide(encoding, text):
    assert likeliest(text.encode(encoding)) == encoding


@pytest.mark.parametrize(("encoding", "text"), [case for case in CASES if len(case[1]) > 30])
def test_a_file_is_read_in_it_and_that_is_said(tmp_path, encoding, text):
    file = tmp_path / "a.txt"
    file.write_bytes(f"{text}\n".encode(encoding) * 3)
    problems = []
    (document,) = read_documents(Source(path=str(file)), "skip", problems.append)
    assert document.text == f"{text}\n" * 3
    assert [str(p) for p in problems] == [f"{file}: its encoding is {encoding}; read as {encoding}"]
