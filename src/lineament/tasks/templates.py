"""The wording of retrieval prompts: three sets that share no sentence, no subject and no word to be remembered.

One set is for training, one for choosing what stays softmax, one for what is reported. A fact and its question share
their wording up to the value, so that a small base model knows what is asked: completion, not instruction.
"""

from dataclasses import dataclass

KINDS = ("digits", "words", "two-needles", "key-value")
SETS = ("train", "place", "test")


@dataclass(frozen=True)
class Wording:
    """How one set speaks. `{x}` is the subject; the value follows the text directly.

    Args:
        codes: facts with digits. passwords: facts with words. Each is (before the value, after the value).
        lists: (heading, the word between key and value) of key-value lists.
        subjects: what a fact is about.
        keys: names in the lists.
        words: to be remembered.
    """

    codes: tuple[tuple[str, str], ...]
    passwords: tuple[tuple[str, str], ...]
    lists: tuple[tuple[str, str], ...]
    subjects: tuple[str, ...]
    keys: tuple[str, ...]
    words: tuple[str, ...]


def phrases(text: str) -> tuple[str, ...]:
    """Return the phrases of a text that parts them by commas."""
    return tuple(text.split(", "))


TEST = Wording(
    codes=(
        ("The secret code of the {x} is", ". Remember this code."),
        ("The magic number for the {x} is", ". Keep it in mind."),
        ("To open the {x}, the pin to enter is", ". Do not forget it."),
    ),
    passwords=(
        ("The three passwords of the {x} are", ". Remember these words."),
        ("The hidden message inside the {x} reads:", ". Keep it in mind."),
        ("At the {x}, the guard must hear the words", ". Do not forget them."),
    ),
    lists=(
        ("Here is the list of room numbers.", " has the room number"),
        ("Here is the table of locker numbers.", " has the locker number"),
    ),
    subjects=phrases(
        "lighthouse, museum, castle, bakery, harbor, library, observatory, theater, cathedral, greenhouse, "
        "stadium, monastery, brewery, aquarium, embassy, sawmill"
    ),
    keys=phrases(
        "Alice, Bruno, Clara, Dmitri, Elena, Felix, Greta, Hugo, Irene, Jonas, Karen, Lukas, Maria, Nadia, "
        "Oscar, Paula, Quentin, Rosa, Simon, Tanya"
    ),
    words=phrases(
        "river, candle, orange, hammer, silver, window, garden, pencil, thunder, rabbit, copper, island, "
        "mirror, velvet, bridge, anchor, lemon, falcon, basket, winter, marble, ticket"
    ),
)

PLACE = Wording(
    codes=(
        ("The access key of the {x} is", ". Note it down."),
        ("The serial number printed on the {x} is", ". It will be needed later."),
    ),
    passwords=(
        ("The call sign of the {x} is", ". Note it down."),
        ("On the door of the {x} somebody wrote:", ". It will be needed later."),
    ),
    lists=(("These are the phone extensions.", " can be reached at extension"),),
    subjects=phrases(
        "submarine, tractor, elevator, telescope, generator, printer, freezer, satellite, piano, helicopter, "
        "furnace, compressor"
    ),
    keys=phrases(
        "Anton, Beatrice, Carlos, Daphne, Edgar, Fiona, Gustav, Helga, Ivan, Julia, Kevin, Laura, Martin, "
        "Nora, Otto, Priya"
    ),
    words=phrases(
        "planet, butter, dragon, forest, guitar, helmet, jacket, kitten, ladder, magnet, needle, ocean, "
        "parrot, rocket, saddle, tunnel"
    ),
)

TRAIN = Wording(
    codes=(
        ("The account number of the {x} is", ". Please memorise it."),
        ("The combination of the safe in the {x} is", ". Somebody will ask for it."),
        ("The ticket that belongs to the {x} carries the number", ". This matters."),
        ("My notes say that the {x} was registered under", ". Let me repeat that later."),
    ),
    passwords=(
        ("The nicknames used by the {x} are", ". Please memorise them."),
        ("Whoever visits the {x} is greeted with", ". Somebody will ask for it."),
        ("The favourite things of the {x} are", ". This matters."),
    ),
    lists=(
        ("The scores of the players follow.", " scored"),
        ("The order numbers of the customers follow.", " placed order"),
        ("The badge of every visitor is listed.", " wears badge"),
    ),
    subjects=phrases(
        "gardener, pilot, dentist, orchestra, village, kindergarten, shipyard, committee, laundry, barber, "
        "expedition, tribunal, circus, farmhouse, hostel, clinic, workshop, ferry, quarry, choir, vineyard, "
        "tavern, post office, fire brigade"
    ),
    keys=phrases(
        "Adam, Bella, Cedric, Diana, Emil, Frida, Georg, Hanna, Isaac, Jenny, Klaus, Lydia, Milan, Nina, "
        "Olaf, Petra, Ralph, Sonja, Tobias, Ursula, Viktor, Wanda, Xavier, Yvonne"
    ),
    words=phrases(
        "apple, blanket, camel, diamond, engine, feather, glacier, harvest, insect, jungle, kettle, lantern, "
        "meadow, napkin, onion, pepper, quartz, ribbon, spider, turtle, umbrella, violin, walnut, yellow, "
        "zebra, cotton, donkey, eagle, flute, ginger"
    ),
)

TEMPLATES: dict[str, Wording] = {"train": TRAIN, "place": PLACE, "test": TEST}
