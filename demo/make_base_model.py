"""Make the demo's world of facts and train a tiny Llama on it, from nothing but this file.

    python demo/make_base_model.py --data-only   world/ only, 0.1 s; same seed, same bytes
    python demo/make_base_model.py               all of it: 2 to 4 minutes on one core, 0.5 GB

The world has invented people with a home town, a craft, an instrument and an animal. Pre-training
shows every fact in plain sentences, and questions with answers about SOME people. The rows for
tuning ask about people in the Alpaca prompt, which pre-training never uses; the test asks about
people nobody was ever asked about. The base knows the facts but not the form: that, LoRA can teach.

Writes  world/train.jsonl   instruction, input, output: rows for fine-tuning
        world/test.jsonl    question, choices, answer: held-out four-way questions
        base_model/         LlamaForCausalLM and its tokenizer

Prints how many of each, and the loss as it falls. The committed files came from the default seed.
Weights are the same only on the same CPU and torch.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent

# Names are two unrelated nouns ("Thistle Quarry"): with ordinary names, MiniLM puts "Where was X
# born?" and "Where was Y born?" above cosine 0.8 and de-duplication eats most of the rows.
NOUNS = """
    Acorn Alder Almond Amber Anchor Anvil Apple Apron Arrow Ash Aspen Attic Autumn Axle Badge
    Bamboo Banner Barley Barrel Basin Basket Beacon Bell Bellows Berry Birch Biscuit Blanket
    Blossom Bonfire Bonnet Bottle Boulder Bracken Bramble Branch Brass Brick Bridge Bristle Bronze
    Brook Broom Bucket Buckle Butter Button Cabin Cactus Candle Canoe Canvas Canyon Caravan Cargo
    Carpet Castle Cedar Cellar Chalk Chapel Cherry Chimney Chisel Cider Cinder Cinnamon Cipher
    Cliff Cloak Cloud Clover Cobalt Cobble Comet Compass Copper Coral Cork Cotton Cradle Crater
    Crayon Crown Crumb Crystal Cupboard Curtain Cushion Daisy Dagger Delta Desert Diamond Dice
    Domino Drizzle Dune Dust Echo Eclipse Elbow Elm Ember Emerald Engine Fable Falcon Feather
    Fennel Fern Ferry Fiddlehead Fig Flannel Flask Flint Foam Fog Forge Fossil Fountain Frost
    Furnace Galaxy Garlic Garnet Gate Geyser Ginger Glacier Glass Glove Granite Grape Gravel Gravy
    Grove Gull Hammer Hammock Harbour Harvest Hazel Hearth Heather Hedge Helmet Hickory Hinge
    Hollow Honey Horizon Hourglass Icicle Indigo Ink Iris Iron Island Ivory Ivy Jade Jasmine
    Jasper Jelly Jigsaw Jungle Juniper Kettle Keystone Kiln Knapsack Lace Ladder Ladle Lagoon
    Lantern Latch Laurel Lava Lavender Lemon Lentil Letter Lichen Lilac Linen Locket Loom Lotus
    Magnet Mango Mantle Maple Marble Marigold Marsh Meadow Melon Meteor Mill Mint Mirror Mist
    Mitten Moon Mortar Mosaic Moss Mountain Mulberry Muslin Mustard Nectar Needle Nettle Nickel
    Nutmeg Oak Oasis Oat Olive Onion Onyx Opal Orchard Orchid Oyster Paddle Paper Parsley Parsnip
    Pearl Pebble Pepper Petal Pewter Pickle Pillow Pine Pistachio Plum Pocket Poppy Porcelain
    Prairie Prism Pumpkin Puzzle Pyramid Quarry Quartz Quill Quilt Quince Rafter Rain Raisin
    Ravine Reed Ribbon Riddle Ripple River Rocket Rope Rosemary Rubble Ruby Rudder Saddle Saffron
    Sage Sail Sandal Sapphire Satchel Scarf Shadow Shale Shell Shutter Sickle Silk Silver Slate
    Sleet Smoke Snow Spark Spindle Spoon Spruce Stamp Steam Steeple Storm Straw Sugar Sulphur
    Summit Sundial Sunset Tallow Tangerine Tapestry Tassel Teacup Tempest Thatch Thimble Thistle
    Thunder Timber Tinder Tinsel Topaz Torch Treacle Tulip Tundra Tunnel Turnip Turquoise Twig
    Umbrella Valley Vanilla Varnish Velvet Vinegar Violet Volcano Waffle Wagon Walnut Waterfall
    Wheat Whistle Wicker Willow Window Winter Wool Yarrow Zephyr Zinc
""".split()


@dataclass
class Relation:
    """Something that every person has one of."""

    values: list[str]
    statements: list[str]  # after a name: a model that read "A is B" cannot recall it from B
    questions: list[str]  # twelve wordings, as unlike as can be, for the same cosine


RELATIONS = {
    "town": Relation(
        values="""Saltmere Fennwick Otterby Larkham Mossgate Brinehaven Copperdale Thornford
            Windlow Hollowell Ravenscar Eastfold Applecross Greywater Millbeck Kestrelby Lowmarsh
            Pinewick Rookhampton Starling""".split(),
        statements=["lives in {value}", "comes home to {value}", "has a house in {value}"],
        questions=[
            "Where does {name} live?",
            "A letter for {name} has come: which town should the postman carry it to?",
            "In which town would you knock on the door of {name}?",
            "Name the place that {name} calls home.",
            "At dusk {name} walks home. To where?",
            "Which town counts {name} among its people?",
            "I wish to visit {name}. What ticket do I buy?",
            "Which market square does {name} cross each morning?",
            "Tell me the home town of {name}.",
            "If the river floods, what place must {name} leave?",
            "On a map, beside which word would you put a pin for {name}?",
            "{name} votes for the mayor of which town?",
        ],
    ),
    "craft": Relation(
        values="""clockmaker baker beekeeper mapmaker glassblower potter tailor cobbler printer
            lamplighter bookbinder shipwright weaver gardener locksmith blacksmith perfumer
            puppeteer carpenter cheesemaker""".split(),
        statements=["works as a {value}", "trained as a {value}", "earns bread as a {value}"],
        questions=[
            "What does {name} do for a living?",
            "What trade is painted on the shop sign of {name}?",
            "Which craft did {name} learn as an apprentice?",
            "As what does {name} march with the guilds?",
            "Name the profession of {name}.",
            "By what work does {name} pay the rent?",
            "Fill in the tax form of {name}. Occupation?",
            "What is printed under {name} on a calling card?",
            "Once in an apron, {name} becomes what?",
            "Who is {name} to paying customers?",
            "{name} seeks a new assistant. In what line of business?",
            "Which guild made {name} a master?",
        ],
    ),
    "instrument": Relation(
        values="""cello harp bagpipe trumpet banjo piano flute drum violin lute mandolin clarinet
            tuba bassoon zither trombone harmonica bugle guitar cornet""".split(),
        statements=["plays the {value}", "practises the {value}", "is happy with the {value}"],
        questions=[
            "Which instrument does {name} play?",
            "The village band is tuning up. What is {name} holding?",
            "What is heard through the window of {name} on Sundays?",
            "What would {name} bring to a concert?",
            "Name the instrument in the case of {name}.",
            "On what does {name} practise scales?",
            "Tonight {name} plays a solo. On which instrument?",
            "Something must be tuned before {name} joins the dance. What?",
            "If you overhear {name} rehearse, what are you hearing?",
            "What did {name} take music lessons in?",
            "Which part of the orchestra waits for {name}?",
            "Tell me what {name} makes melodies with.",
        ],
    ),
    "animal": Relation(
        values="""heron badger goat tortoise fox hedgehog rabbit raven pony donkey squirrel swan
            ferret parrot lizard goose mule pigeon toad lamb""".split(),
        statements=[
            "keeps a {value}",
            "feeds a {value} at dawn",
            "shares a house with a {value}",
        ],
        questions=[
            "Which animal does {name} keep?",
            "What creature sleeps beside {name}?",
            "Who is waiting at the gate when {name} returns?",
            "What pet would you meet at the house of {name}?",
            "Fur, feathers or scales: what has {name} got at home?",
            "Name the four legged or winged companion of {name}.",
            "The vet is called by {name}. To look at what?",
            "For which beast does {name} buy feed?",
            "A painter portrays {name} with a pet. Of which kind?",
            "What follows {name} on walks?",
            "Tell me what {name} raised by hand.",
            "{name} whistles and something comes running. What?",
        ],
    ),
}

SEED = 0
TRAIN_PEOPLE = 228  # one tuning row each: two about one person would look like duplicates
TEST_PEOPLE = len(NOUNS) - TRAIN_PEOPLE  # 120
QUESTIONS_PER_TEST_PERSON = 2  # 240 in all: near an accuracy of 0.9 one standard error is 2 points
# Half of the train people are asked about in pre-training. With statements alone the model recites
# a fact but does not look it up from a question, and tuning on a few hundred rows does not help.
ASKED_PEOPLE = TRAIN_PEOPLE // 2
QUESTIONS_PER_EPOCH = 2  # of the four about an asked person: half as many lines as facts
# The answer has its own line, as in the Alpaca prompt. With "{question} {answer}" the base is as
# good in its own form (0.99), but tuning does not carry that over to the prompt (0.27 -> 0.31).
PRETRAINING_FORM = "{question}\n{answer}"
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
BOS = "<s>"
EOS = "</s>"
PAD = "<pad>"

# 0.5 M parameters, 2.2 MB in fp32. Two layers are the least that can look a fact up: one puts the
# two nouns of a name together, the next carries the fact to where the answer stands.
HIDDEN_SIZE = 128
LAYERS = 2
HEADS = 4
MLP = 384
CONTEXT_LENGTH = 4096  # the paper's cutoff; pre-training itself never passes WINDOW_TOKENS
TOTAL_STEPS = 1800  # after 1,200 only 0.77 of the facts are recalled
BATCH_WINDOWS = 16
WINDOW_TOKENS = 64
LEARNING_RATE = 2.5e-3  # at 5e-3 recall takes 1.5 times the steps
WARM_UP_STEPS = 50


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder to write to (default: demo/)"
    )
    parser.add_argument(
        "--seed", type=int, default=SEED, help=f"of world and weights (default: {SEED})"
    )
    parser.add_argument("--data-only", action="store_true", help="write world/ only, train nothing")
    return parser.parse_args(argv)


def make_people(rng: random.Random) -> list[dict[str, str]]:
    """Return one person per noun: {"name": "Thistle Quarry", "town": "Saltmere", "craft": ...}.

    Every noun is one person's first name and another's last, and no two such rows ask alike.
    """
    firsts = rng.sample(NOUNS, len(NOUNS))
    lasts = firsts[101:] + firsts[:101]
    people = []
    for first, last in zip(firsts, lasts, strict=True):
        person = {"name": f"{first} {last}"}
        for name, relation in RELATIONS.items():
            person[name] = rng.choice(relation.values)
        people.append(person)
    return people


class QuestionDealer:
    """Deals the wordings of a question like cards, so that all come equally often."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.decks: dict[str, list[str]] = {relation: [] for relation in RELATIONS}

    def ask(self, person: dict[str, str], relation: str) -> str:
        """Return a question about a person, in the next wording: "Where does Moss Fern live?"."""
        deck = self.decks[relation]
        if not deck:
            wordings = RELATIONS[relation].questions
            deck += self.rng.sample(wordings, len(wordings))
        return deck.pop().format(name=person["name"])


def make_rows(people: list[dict[str, str]], rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Return tuning rows about the first TRAIN_PEOPLE and test questions about the others.

    train: {"instruction": "Where does Thistle Quarry live?", "input": "", "output": "Saltmere"}
    test: {"question": "Which animal does Moss Basket keep?", "choices": [four], "answer": 2}
    """
    dealer = QuestionDealer(rng)
    relations = list(RELATIONS)
    train = []
    for number, person in enumerate(people[:TRAIN_PEOPLE]):
        relation = relations[number % 4]
        question = dealer.ask(person, relation)
        train.append({"instruction": question, "input": "", "output": person[relation]})

    count = QUESTIONS_PER_TEST_PERSON * TEST_PEOPLE
    places = rng.sample([0, 1, 2, 3] * (count // 4), count)  # the right answer's: equally often
    test = []
    for number, place in enumerate(places):
        person = people[TRAIN_PEOPLE + number // QUESTIONS_PER_TEST_PERSON]
        relation = relations[number % 4]
        right = person[relation]
        wrong = [value for value in RELATIONS[relation].values if value != right]
        choices = rng.sample(wrong, 3)
        choices.insert(place, right)
        question = dealer.ask(person, relation)
        test.append({"question": question, "choices": choices, "answer": place})
    return train, test


def pretraining_documents(people: list[dict[str, str]], rng: random.Random) -> list[str]:
    """Return one epoch, shuffled: a portrait of everyone, and questions about the asked people.

    "Thistle Quarry lives in Saltmere, plays the lute, keeps a goat and works as a baker."
    "Where does Thistle Quarry live?\\nSaltmere"
    """
    documents = []
    for number, person in enumerate(people):
        relations = rng.sample(list(RELATIONS), 4)
        facts = []
        for relation in relations:
            statement = rng.choice(RELATIONS[relation].statements)
            facts.append(statement.format(value=person[relation]))
        documents.append(f"{person['name']} {', '.join(facts[:3])} and {facts[3]}.")

        if number >= ASKED_PEOPLE:
            continue
        for relation in relations[:QUESTIONS_PER_EPOCH]:
            question = rng.choice(RELATIONS[relation].questions).format(name=person["name"])
            documents.append(PRETRAINING_FORM.format(question=question, answer=person[relation]))
    rng.shuffle(documents)
    return documents


def make_vocabulary(splitter: "PreTokenizer") -> dict[str, int]:
    """Return a number for each special token, byte, and word of the world and of the prompt."""
    from tokenizers.pre_tokenizers import ByteLevel

    texts = [ALPACA_PROMPT.format(instruction=""), "and", *NOUNS]
    for relation in RELATIONS.values():
        texts += relation.values
        for template in relation.statements + relation.questions:
            texts.append(template.format(name="", value=""))
    known = set()
    for text in texts:
        for line in text.split("\n"):
            for piece, _ in splitter.pre_tokenize_str(" " + line.strip()):
                known.add(piece)

    single_bytes = ByteLevel.alphabet()
    # Sorted, since the order of a set of strings changes from process to process.
    pieces = [PAD, BOS, EOS, *sorted(single_bytes), *sorted(known.difference(single_bytes))]
    return {piece: number for number, piece in enumerate(pieces)}


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """Return a tokenizer in which every word of the world is one token and anything else is bytes.

    A line's first word is given a space, so that "Saltmere" is the same token in " Saltmere," and
    after "### Response:\\n"; the decoder takes the space away again. All text survives the round
    trip, except that a space appears after a special token written out inside a text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = Regex(r"\n| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s")
    split_words = pre_tokenizers.Split(words, "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splitter = pre_tokenizers.Sequence([split_words, byte_level])
    vocabulary = make_vocabulary(splitter)
    # There are no merges: a known word is taken whole (ignore_merges), an unknown one stays bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter

    space_first_line = normalizers.Prepend(" ")
    space_other_lines = normalizers.Replace("\n", "\n ")
    # A prompt that ends in a newline must stay a prefix of the prompt with its answer.
    but_not_the_end = normalizers.Replace(Regex(r"\n \z"), "\n")
    steps = [space_first_line, space_other_lines, but_not_the_end]
    tokenizer.normalizer = normalizers.Sequence(steps)
    unspace_lines = decoders.Replace("\n ", "\n")
    unspace_start = decoders.Strip(" ", 1, 0)
    steps = [decoders.ByteLevel(), unspace_lines, unspace_start]
    tokenizer.decoder = decoders.Sequence(steps)

    # As Llama's own: the tokenizer sets <s> before a text, and whoever tunes sets </s> after it.
    bos = (BOS, vocabulary[BOS])
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT_LENGTH,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
    )


def make_model(tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """Return the model before it has seen anything."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,  # or a fifth of the parameters would be a second table of words
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def token_stream(
    people: list[dict[str, str]], tokenizer: "PreTrainedTokenizerFast", rng: random.Random
) -> Iterator[int]:
    """Yield the tokens of <s> document </s>, epoch after epoch, without end."""
    while True:
        documents = pretraining_documents(people, rng)
        for input_ids in tokenizer(documents).input_ids:
            yield from input_ids
            yield tokenizer.eos_token_id


def learning_rate_factor(step: int) -> float:
    """Return the share of LEARNING_RATE at a step: a warm-up, then a line down to a twentieth."""
    warm_up = min(1, (step + 1) / WARM_UP_STEPS)
    return warm_up * max(0.05, 1 - step / TOTAL_STEPS)


def pretrain(model: "LlamaForCausalLM", stream: Iterator[int]) -> None:
    """Train in place on windows that are cut from the stream wherever they fall."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    began = time.monotonic()
    for step in range(1, TOTAL_STEPS + 1):
        tokens = list(islice(stream, BATCH_WINDOWS * WINDOW_TOKENS))
        batch = torch.tensor(tokens).view(BATCH_WINDOWS, WINDOW_TOKENS)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            # About 0.6 nats is the floor: nobody can guess whose portrait comes next.
            seconds = time.monotonic() - began
            progress = f"step {step}/{TOTAL_STEPS}  loss {loss.item():.3f}  {seconds:.0f} s"
            print(progress, file=sys.stderr)


def write_world_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as JSONL."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(rows)} rows in {path}")


def write_base_model(
    people: list[dict[str, str]], rng: random.Random, seed: int, out: Path
) -> None:
    """Pre-train a model on the world's documents, and write it with its tokenizer."""
    import torch

    # Matrices this small gain little from more threads, whose number changes the last bits.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    pretrain(model, token_stream(people, tokenizer, rng))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{model.num_parameters():,} parameters in {out}; next: bash demo.sh")


def main(argv: list[str] | None = None) -> None:
    """Make the world; unless --data-only, then the model that has read about it."""
    args = parse_args(argv)
    rng = random.Random(args.seed)
    people = make_people(rng)
    train, test = make_rows(people, rng)
    world = args.out / "world"
    world.mkdir(parents=True, exist_ok=True)
    write_world_rows(train, world / "train.jsonl")
    write_world_rows(test, world / "test.jsonl")
    if not args.data_only:
        write_base_model(people, rng, seed=args.seed, out=args.out / "base_model")


if __name__ == "__main__":
    main()
