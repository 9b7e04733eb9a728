"""The generators' own small tables: words, names, places and the few facts that the bundled model is meant to know.

Owns data only. All entries are common knowledge, written down for this recipe; nothing is copied from a data set.
"""

from __future__ import annotations

NAMES = (
    "Anna Ben Carla David Emma Frank Grace Henry Iris Jack Kate Liam Mia Noah Olivia Paul Quinn Rosa Sam Tina Uma Victor Wendy Xavier Yara Zoe "
    "Alice Bob Clara Daniel Ella Felix Gina Hugo Ida Jonas Kim Lena Max Nina Oscar Pia Ralf Sara Tom Ursula Vera Will Yusuf Zara Ahmed Chen "
    "Diego Elena Fatima Ivan Julia Kofi Lucia Maria Nadia Omar Priya Ravi Sofia Tariq Maya Leo Ruby Theo Ada Alan Linus Peter Susan John Mary "
    "James Lucy George Helen Simon Laura Martin Eva Robert Jane Mark Amy Steven Karen Brian Lisa Kevin Sandra Eric Monica"
).split()

CITIES = (
    "Paris London Berlin Madrid Rome Vienna Lisbon Dublin Oslo Prague Warsaw Athens Cairo Tokyo Delhi Lima Boston Chicago Denver Seattle Austin "
    "Toronto Sydney Zurich Geneva Munich Hamburg Lyon Milan Naples Turin Porto Seville Valencia Bergen Malmo Helsinki Copenhagen Amsterdam Brussels "
    "Budapest Istanbul Nairobi Lagos Accra Mumbai Osaka Kyoto Seoul Beijing Shanghai Bangkok Hanoi Jakarta Manila Dallas Miami Phoenix Portland"
).split()

WORDS = (
    "apple bread water house table chair window garden flower river mountain forest ocean island bridge street market school teacher student "
    "book paper pencil letter story music song dance picture color light shadow morning evening night summer winter spring autumn weather cloud "
    "rain snow wind storm fire earth stone sand metal gold silver iron glass wood cotton leather button shirt jacket shoe hat glove scarf pocket "
    "kitchen bedroom bathroom door wall floor roof stair lamp clock mirror pillow blanket carpet basket bottle cup plate spoon fork knife bowl "
    "sugar salt pepper butter cheese milk honey egg rice pasta soup salad fruit banana orange lemon cherry grape peach pear melon berry carrot "
    "potato tomato onion garlic bean corn cake cookie candy coffee tea juice dog cat horse cow sheep goat pig chicken duck rabbit mouse tiger lion "
    "bear wolf fox deer monkey elephant giraffe zebra camel snake frog turtle fish shark whale dolphin eagle owl parrot penguin bee butterfly "
    "spider ant train plane boat ship car bus bicycle truck engine wheel road ticket travel journey map country city village castle tower church "
    "museum library hospital office factory farm field hill valley lake beach desert planet star moon sun sky space rocket robot computer phone "
    "camera radio screen keyboard program number letter word sentence page chapter question answer problem solution idea dream hope love friend "
    "family mother father sister brother baby child uncle aunt cousin neighbor doctor nurse farmer baker driver pilot sailor soldier artist writer "
    "singer actor king queen prince princess giant dwarf wizard dragon magic secret treasure key box bag rope hammer nail ladder brush paint "
    "happy sad angry tired hungry thirsty quick slow strong weak brave kind clever funny quiet loud bright dark clean dirty heavy small large "
    "tall short long wide narrow deep young old new fresh warm cold hot cool dry wet soft hard sweet sour bitter simple strange gentle "
    "run walk jump swim climb throw catch carry build break open close start finish read write speak listen watch think learn teach "
    "play sing draw cook bake wash sleep wake smile laugh cry help give take bring send find lose keep wait hold push pull turn move "
    "python code function string list class module error test file folder network server memory kernel cache token model data tree graph "
    "hello world strawberry blueberry raspberry mississippi racecar level noon radar civic kayak banana coconut pumpkin rainbow sunflower "
    "football baseball tennis soccer hockey guitar piano violin trumpet drum flute circle square triangle line point angle area volume minute "
    "hour second week month year today tomorrow yesterday birthday holiday winter party present candle balloon puzzle game prize team player"
).split()
WORDS = list(dict.fromkeys(WORDS))

CHARACTERS = (  # who or what a story may be about, and nouns for other questions
    "dragon princess prince knight wizard witch king queen pirate robot astronaut detective ghost vampire werewolf unicorn mermaid fairy elf dwarf "
    "giant troll goblin ogre monster alien zombie ninja samurai cowboy sailor captain farmer baker teacher doctor nurse pilot fisherman hunter thief "
    "spy scientist inventor painter musician dancer singer clown magician gardener shepherd blacksmith carpenter tailor miner soldier general boy "
    "girl man woman child baby grandmother grandfather brother sister twin hero villain stranger traveler hermit monk student snowman scarecrow "
    "puppet teddy doll toy balloon kite bicycle train truck boat ship submarine rocket spaceship satellite lighthouse windmill castle tower bridge "
    "cottage teapot teacup lantern candle mirror clock pumpkin potato carrot cabbage acorn mushroom sunflower rose tulip cactus willow oak pebble "
    "snowflake raindrop cloud rainbow star comet planet moonbeam shadow volcano iceberg puddle pencil crayon paintbrush notebook dictionary umbrella "
    "suitcase backpack button zipper sock mitten slipper spoon fork kettle toaster fridge lamp pillow blanket cookie cupcake pancake waffle donut "
    "lollipop pretzel pickle noodle sandwich muffin biscuit kangaroo koala panda platypus hippo rhino crocodile alligator lizard gecko chameleon "
    "iguana dinosaur mammoth seal walrus otter beaver badger raccoon skunk hamster gerbil ferret weasel moose reindeer llama alpaca donkey mule pony "
    "bison buffalo antelope gazelle leopard cheetah panther jaguar lynx hyena jackal coyote raven crow sparrow robin swallow pigeon seagull pelican "
    "flamingo peacock ostrich turkey goose swan rooster hen chick octopus squid jellyfish starfish crab lobster shrimp salmon trout goldfish "
    "seahorse snail slug worm beetle ladybug cricket grasshopper dragonfly moth firefly mosquito wasp caterpillar centipede scorpion programmer "
    "compiler computer keyboard transistor laptop telescope microscope compass treasure necklace crown chipmunk porcupine sloth gorilla chimpanzee "
    "baboon lemur phoenix griffin centaur cyclops yeti sphinx golem banshee leprechaun gnome"
).split()

ANIMALS = (
    "dog cat horse cow sheep goat pig rabbit mouse tiger lion bear wolf fox deer monkey elephant giraffe zebra camel frog turtle dolphin whale "
    "eagle owl parrot penguin duck squirrel hedgehog"
).split()
FRUITS = "apple banana orange lemon cherry grape peach pear melon plum mango kiwi strawberry pineapple".split()
VEGETABLES = "carrot potato tomato onion cucumber pepper cabbage spinach broccoli pumpkin pea bean".split()
COLORS = "red blue green yellow orange purple pink brown black white gray".split()
SPORTS = "football tennis basketball swimming hockey volleyball golf boxing skiing cycling".split()
INSTRUMENTS = "piano guitar violin drum flute trumpet harp cello saxophone clarinet".split()
TOOLS_AT_HOME = "hammer saw screwdriver wrench drill pliers ladder axe shovel rake".split()
VEHICLES = "car bus train plane boat bicycle truck motorcycle tram helicopter".split()
CLOTHES = "shirt jacket shoe hat glove scarf sock coat dress sweater".split()
FURNITURE = "table chair bed sofa desk shelf cupboard bench stool wardrobe".split()
LANGUAGES = ["Python", "Java", "C", "Rust", "Go", "Ruby", "Swift", "Kotlin", "Haskell", "JavaScript"]
CATEGORIES: dict[str, tuple[str, list[str]]] = {
    "animal": ("animals", ANIMALS),
    "fruit": ("fruits", FRUITS),
    "vegetable": ("vegetables", VEGETABLES),
    "color": ("colors", COLORS),
    "sport": ("sports", SPORTS),
    "instrument": ("musical instruments", INSTRUMENTS),
    "tool": ("tools", TOOLS_AT_HOME),
    "vehicle": ("vehicles", VEHICLES),
    "piece of clothing": ("clothes", CLOTHES),
    "piece of furniture": ("pieces of furniture", FURNITURE),
    "programming language": ("programming languages", LANGUAGES),
}

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
SEASON_OF = ("winter", "winter", "spring", "spring", "spring", "summer", "summer", "summer", "autumn", "autumn", "autumn", "winter")
PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()

# country: (capital, continent, main language)
COUNTRIES = {
    "France": ("Paris", "Europe", "French"),
    "Germany": ("Berlin", "Europe", "German"),
    "Italy": ("Rome", "Europe", "Italian"),
    "Spain": ("Madrid", "Europe", "Spanish"),
    "Portugal": ("Lisbon", "Europe", "Portuguese"),
    "Austria": ("Vienna", "Europe", "German"),
    "Poland": ("Warsaw", "Europe", "Polish"),
    "Greece": ("Athens", "Europe", "Greek"),
    "Norway": ("Oslo", "Europe", "Norwegian"),
    "Sweden": ("Stockholm", "Europe", "Swedish"),
    "Denmark": ("Copenhagen", "Europe", "Danish"),
    "Finland": ("Helsinki", "Europe", "Finnish"),
    "Iceland": ("Reykjavik", "Europe", "Icelandic"),
    "Hungary": ("Budapest", "Europe", "Hungarian"),
    "Romania": ("Bucharest", "Europe", "Romanian"),
    "Bulgaria": ("Sofia", "Europe", "Bulgarian"),
    "Ukraine": ("Kyiv", "Europe", "Ukrainian"),
    "Croatia": ("Zagreb", "Europe", "Croatian"),
    "England": ("London", "Europe", "English"),
    "Scotland": ("Edinburgh", "Europe", "English"),
    "Japan": ("Tokyo", "Asia", "Japanese"),
    "China": ("Beijing", "Asia", "Chinese"),
    "Thailand": ("Bangkok", "Asia", "Thai"),
    "Vietnam": ("Hanoi", "Asia", "Vietnamese"),
    "Turkey": ("Ankara", "Asia", "Turkish"),
    "Iran": ("Tehran", "Asia", "Persian"),
    "Iraq": ("Baghdad", "Asia", "Arabic"),
    "South Korea": ("Seoul", "Asia", "Korean"),
    "Mongolia": ("Ulaanbaatar", "Asia", "Mongolian"),
    "Nepal": ("Kathmandu", "Asia", "Nepali"),
    "Egypt": ("Cairo", "Africa", "Arabic"),
    "Kenya": ("Nairobi", "Africa", "Swahili"),
    "Ghana": ("Accra", "Africa", "English"),
    "Morocco": ("Rabat", "Africa", "Arabic"),
    "Ethiopia": ("Addis Ababa", "Africa", "Amharic"),
    "Canada": ("Ottawa", "North America", "English"),
    "Mexico": ("Mexico City", "North America", "Spanish"),
    "Cuba": ("Havana", "North America", "Spanish"),
    "Brazil": ("Brasilia", "South America", "Portuguese"),
    "Argentina": ("Buenos Aires", "South America", "Spanish"),
    "Chile": ("Santiago", "South America", "Spanish"),
    "Peru": ("Lima", "South America", "Spanish"),
    "Colombia": ("Bogota", "South America", "Spanish"),
    "Australia": ("Canberra", "Oceania", "English"),
    "New Zealand": ("Wellington", "Oceania", "English"),
}

SOUNDS = {
    "dog": "woof",
    "cat": "meow",
    "cow": "moo",
    "sheep": "baa",
    "duck": "quack",
    "pig": "oink",
    "horse": "neigh",
    "lion": "roar",
    "owl": "hoot",
    "bee": "buzz",
    "snake": "hiss",
    "frog": "ribbit",
    "rooster": "cock-a-doodle-doo",
    "mouse": "squeak",
    "crow": "caw",
    "wolf": "howl",
}
YOUNG = {
    "dog": "puppy",
    "cat": "kitten",
    "cow": "calf",
    "sheep": "lamb",
    "horse": "foal",
    "duck": "duckling",
    "pig": "piglet",
    "lion": "cub",
    "bear": "cub",
    "goat": "kid",
    "frog": "tadpole",
    "hen": "chick",
    "deer": "fawn",
    "kangaroo": "joey",
}
LEGS = {
    "dog": 4,
    "cat": 4,
    "horse": 4,
    "cow": 4,
    "bird": 2,
    "duck": 2,
    "spider": 8,
    "ant": 6,
    "bee": 6,
    "human": 2,
    "fish": 0,
    "snake": 0,
    "elephant": 4,
    "butterfly": 6,
    "chicken": 2,
    "tiger": 4,
    "person": 2,
    "table": 4,
}
COLOR_OF = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "a banana": "yellow",
    "blood": "red",
    "coal": "black",
    "a carrot": "orange",
    "milk": "white",
    "the sun": "yellow",
    "a lemon": "yellow",
    "a tomato": "red",
    "chocolate": "brown",
    "an elephant": "gray",
    "a flamingo": "pink",
    "the ocean": "blue",
    "a strawberry": "red",
    "a fire truck": "red",
}
MIXES = {
    ("red", "blue"): "purple",
    ("red", "yellow"): "orange",
    ("blue", "yellow"): "green",
    ("red", "white"): "pink",
    ("black", "white"): "gray",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "tall": "short",
    "fast": "slow",
    "happy": "sad",
    "day": "night",
    "up": "down",
    "left": "right",
    "open": "closed",
    "old": "young",
    "new": "used",
    "light": "dark",
    "heavy": "weightless",
    "wet": "dry",
    "full": "empty",
    "early": "late",
    "hard": "soft",
    "rich": "poor",
    "strong": "weak",
    "clean": "dirty",
    "loud": "quiet",
    "good": "bad",
    "yes": "no",
    "black": "white",
    "in": "out",
    "true": "false",
    "near": "far",
    "high": "low",
    "long": "brief",
    "wide": "narrow",
    "first": "last",
    "begin": "end",
    "love": "hate",
    "win": "lose",
    "buy": "sell",
    "push": "pull",
    "sweet": "sour",
    "deep": "shallow",
    "thick": "thin",
    "smooth": "rough",
    "east": "west",
    "north": "south",
    "before": "after",
}
PLURALS = {
    "mouse": "mice",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "man": "men",
    "woman": "women",
    "goose": "geese",
    "person": "people",
    "sheep": "sheep",
    "fish": "fish",
    "leaf": "leaves",
    "wolf": "wolves",
    "knife": "knives",
    "city": "cities",
    "baby": "babies",
    "box": "boxes",
    "bus": "buses",
    "cat": "cats",
    "dog": "dogs",
    "house": "houses",
    "book": "books",
    "car": "cars",
    "tree": "trees",
    "apple": "apples",
    "story": "stories",
    "dish": "dishes",
    "potato": "potatoes",
    "table": "tables",
    "chair": "chairs",
    "party": "parties",
}
PAST = {
    "go": "went",
    "eat": "ate",
    "see": "saw",
    "run": "ran",
    "write": "wrote",
    "take": "took",
    "give": "gave",
    "come": "came",
    "sing": "sang",
    "swim": "swam",
    "drink": "drank",
    "buy": "bought",
    "think": "thought",
    "bring": "brought",
    "teach": "taught",
    "catch": "caught",
    "fly": "flew",
    "walk": "walked",
    "play": "played",
    "jump": "jumped",
    "talk": "talked",
    "make": "made",
    "find": "found",
    "speak": "spoke",
    "sleep": "slept",
}
SHAPES = {"triangle": 3, "square": 4, "rectangle": 4, "pentagon": 5, "hexagon": 6, "heptagon": 7, "octagon": 8}
SYMBOLS = {
    "hydrogen": "H",
    "oxygen": "O",
    "carbon": "C",
    "nitrogen": "N",
    "gold": "Au",
    "silver": "Ag",
    "iron": "Fe",
    "helium": "He",
    "sodium": "Na",
    "copper": "Cu",
    "lead": "Pb",
    "zinc": "Zn",
}
ROMAN = "I II III IV V VI VII VIII IX X XI XII XIII XIV XV XVI XVII XVIII XIX XX".split()
UNITS = (  # larger, smaller, how many smaller in one larger
    ("kilometer", "meter", 1000),
    ("meter", "centimeter", 100),
    ("centimeter", "millimeter", 10),
    ("kilogram", "gram", 1000),
    ("hour", "minute", 60),
    ("minute", "second", 60),
    ("day", "hour", 24),
    ("week", "day", 7),
    ("year", "month", 12),
    ("liter", "milliliter", 1000),
    ("foot", "inch", 12),
    ("yard", "foot", 3),
    ("euro", "cent", 100),
    ("dollar", "cent", 100),
    ("ton", "kilogram", 1000),
)
UNIT_PLURALS = {"foot": "feet", "inch": "inches"}

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen").split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(n: int) -> str:
    """The English name of 0 <= n < 10000: 342 -> "three hundred forty-two"."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{ONES[n // 100]} hundred" + (f" {in_words(n % 100)}" if n % 100 else "")
    return f"{in_words(n // 1000)} thousand" + (f" {in_words(n % 1000)}" if n % 1000 else "")


def unit(name: str, n: int) -> str:
    """The unit's name for n of it."""
    return name if n == 1 else UNIT_PLURALS.get(name, name + "s")
