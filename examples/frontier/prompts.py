"""The prompts: one simple sentence about each of many topics, and how the model reads them."""

import math

TOPICS = """
rain, trains, winter, coffee, bread, libraries, bicycles, mountains, rivers, gardens, chess, violins, markets, bridges,
owls, honey, thunder, deserts, lighthouses, kitchens, maps, clocks, letters, candles, islands, forests, teachers,
nurses, farmers, bakers, sailors, carpenters, doctors, poets, painters, drummers, dancers, runners, swimmers, gardeners,
apples, oranges, lemons, tomatoes, onions, potatoes, carrots, mushrooms, cheese, butter, rice, pasta, soup, salad, tea,
chocolate, pepper, salt, sugar, vinegar, dogs, cats, horses, cows, sheep, goats, rabbits, foxes, wolves, bears, deer,
eagles, crows, sparrows, ducks, swans, whales, dolphins, sharks, turtles, frogs, snakes, spiders, bees, ants,
butterflies, moths, worms, snails, crabs, oaks, pines, willows, roses, tulips, daisies, ferns, moss, grass, weeds, snow,
ice, fog, wind, clouds, storms, floods, droughts, sunsets, rainbows, the moon, the sun, stars, comets, planets, oceans,
lakes, ponds, waterfalls, beaches, caves, cliffs, valleys, volcanoes, glaciers, cities, villages, farms, castles,
churches, temples, museums, theaters, hospitals, schools, universities, offices, factories, airports, harbors, stations,
tunnels, roads, parks, playgrounds, stadiums, hotels, restaurants, cafes, bakeries, bookshops, attics, cellars, windows,
doors, roofs, stairs, chairs, tables, beds, lamps, mirrors, carpets, curtains, shelves, drawers, knives, spoons, plates,
cups, bottles, pans, ovens, stoves, fridges, brooms, buckets, hammers, nails, saws, ladders, ropes, needles, scissors,
buttons, shoes, boots, hats, gloves, scarves, coats, umbrellas, socks, sweaters, dresses, pockets, bags, wallets, keys,
coins, stamps, tickets, newspapers, magazines, novels, diaries, dictionaries, pencils, pens, notebooks, photographs,
paintings, statues, songs, operas, films, cartoons, puppets, dolls, kites, balloons, toys, puzzles, cards, dice,
football, tennis, hockey, golf, boxing, skiing, sailing, fishing, hiking, camping, cooking, sewing, knitting, reading,
writing, singing, dreaming, sleeping, waiting, traveling, shopping, cleaning, painting, moving house, getting lost,
being late, growing up, growing old, making friends, telling jokes, keeping secrets, losing a game, winning a prize,
homework, exams, holidays, birthdays, weddings, funerals, parties, neighbors, cousins, grandparents, brothers, sisters,
babies, strangers, customers, landlords, lawyers, judges, soldiers, pilots, drivers, cooks, waiters, plumbers,
electricians, engineers, scientists, librarians, journalists, photographers, mayors, kings, queens, thieves, pirates,
ghosts, dragons, witches, giants, robots, computers, telephones, radios, televisions, cameras, batteries, engines, cars,
buses, trucks, trams, ferries, rockets, satellites, elevators, traffic lights, taxes, rent, debts, loans, strikes,
elections, laws, prisons, borders, wars, peace, silence, noise, hunger, thirst, pain, sickness, medicine, vaccines,
accidents, fires, earthquakes, pollution, recycling, plastic, paper, glass, steel, gold, silver, copper, wood, stone,
sand, clay, wool, cotton, silk, leather
"""
# For seed 3 and later ones
MORE_TOPICS = """
acrobats, actors, admirals, almonds, alphabets, ambulances, anchors, anthills, antelopes, apricots, aprons, aquariums,
archers, architects, armchairs, arrows, asteroids, astronauts, athletes, avalanches, axes, badgers, bagpipes, balconies,
bamboo, bananas, bandages, banjos, barbers, barns, barrels, baskets, bats, beans, beavers, beetles, bells, belts,
benches, berries, biscuits, blackboards, blankets, blizzards, boats, bonfires, bracelets, brakes, bricks, brushes,
bubbles, buffaloes, cabbages, cactuses, calendars, camels, canals, canaries, canoes, captains, caravans, catalogs,
caterpillars, cellos, cement, cereal, chains, chalk, chameleons, chandeliers, cheetahs, chemistry, cherries, chestnuts,
chickens, chimneys, choirs, cinnamon, circuses, clarinets, clowns, coal, cobblers, coconuts, compasses, concerts,
cookies, corn, corridors, costumes, cradles, cranes, crayons, crickets, crocodiles, crowns, cucumbers, cupboards,
cyclists, daffodils, dams, dentists, detectives, diamonds, dinners, ditches, divers, dragonflies, dressers, drums,
dumplings, dust, echoes, eclipses, eels, eggs, elephants, embroidery, emeralds, envelopes, escalators, fairs, falcons,
feathers, fences, ferrets, festivals, figs, fireflies, fireworks, flags, flamingos, flashlights, fleas, flour, flutes,
footprints, fountains, freckles, frost, furniture, gales, garages, garlic, gates, geese, geography, geometry, geysers,
gifts, ginger, giraffes, goalkeepers, goldfish, gorillas, grammar, grapes, grasshoppers, gravity, greenhouses, guitars,
hail, hairdressers, hammocks, hamsters, handkerchiefs, handwriting, harps, harvests, hawks, hay, hazelnuts, headlights,
hedgehogs, hedges, helicopters, herbs, hermits, herons, hills, hinges, hippos, history, hives, hospitality, hourglasses,
hurricanes, icebergs, igloos, insects, inventors, ivy, jackets, jaguars, jam, jars, jewels, jigsaws, jugglers, juice,
jungles, kangaroos, kettles, keyboards, kingfishers, kittens, koalas, lace, lawns, lemonade, lettuce, lichens, lilies,
lions, lizards, lobsters, locks, logs, lullabies, lunch, magicians, magnets, mangoes, marathons, marble, masks, matches,
meadows, mechanics, melons, mermaids, microscopes, midnight, milk, mills, mines, mist, monkeys, mosquitoes, motorcycles,
mules, muscles, musicians, mustard, myths, necklaces, nests, noodles, nuts, oats, octopuses, oil, olives, orchards,
orchestras, organs, ostriches, otters, oysters, pajamas, pancakes, pandas, parachutes, parrots, passports, peaches,
peacocks, peanuts, pearls, pears, pebbles, penguins, pianos, pickles, picnics, pies, pigeons, pigs, pillows, pipes,
plums, polar bears, ponies, porcupines, postcards, posters, pottery, prisms, proverbs, puddles, pumpkins, puppies,
pyramids, quilts, quizzes, raccoons, radishes, raincoats, raisins, rats, ravens, recipes, refrigerators, reindeer, rings
"""
FRAME = "Write one simple sentence about {}."
# One answer each, where a prompt has one answer only
STYLES = (
    "short",
    "clear",
    "plain",
    "honest",
    "calm",
    "brief",
    "vivid",
    "careful",
    "modern",
    "quiet",
    "curious",
    "serious",
    "poetic",
    "practical",
    "friendly",
    "surprising",
)
HELD_OUT, PROMPTS_PER_SEED = 64, 90


def _mixed(text: str) -> list[str]:
    """The topics of a text, each once, in a fixed order that mixes them."""
    unique = list(dict.fromkeys(topic.strip() for topic in text.replace("\n", " ").split(",")))
    # A stride that shares no factor with the number of topics visits each once
    stride = next(step for step in range(len(unique) // 3, len(unique)) if math.gcd(step, len(unique)) == 1)
    return [unique[i * stride % len(unique)] for i in range(len(unique))]


def topics() -> list[str]:
    """All topics, each once: those held out, then those of each seed."""
    first = _mixed(TOPICS)
    whole = HELD_OUT + (len(first) - HELD_OUT) // PROMPTS_PER_SEED * PROMPTS_PER_SEED
    return list(dict.fromkeys(first[:whole] + _mixed(MORE_TOPICS)))


def questions(group: str) -> list[str]:
    """The questions of a group of answers.

    "held-out" are 64 topics that no training sees. "train-S", "single-S" and "demonstrations-S" are of the 90 topics of
    seed S, which no other seed has: one question per topic, one per topic and style, and one per topic for the first
    48 of them.

    Example:
        >>> len(questions("held-out")), len(questions("train-2")), len(questions("single-0"))
        (64, 90, 1440)
        >>> set(questions("held-out")) & set(questions("train-0"))
        set()
    """
    if group == "held-out":
        return [FRAME.format(topic) for topic in topics()[:HELD_OUT]]
    kind, seed = group.rsplit("-", 1)
    start = HELD_OUT + PROMPTS_PER_SEED * int(seed)
    own = topics()[start : start + PROMPTS_PER_SEED]
    if len(own) < PROMPTS_PER_SEED:
        raise ValueError(f"seed {seed} has no topics: there are enough for seeds 0 to {most_seeds() - 1}.")
    if kind == "single":
        return [f"Write one {style} sentence about {topic}." for style in STYLES for topic in own]
    if kind not in ("train", "demonstrations"):
        raise ValueError(f"There is no group {group!r}: it is held-out, or train-, single- or demonstrations-SEED.")
    return [FRAME.format(topic) for topic in own[: 48 if kind == "demonstrations" else None]]


def most_seeds() -> int:
    """For how many seeds there are topics."""
    return (len(topics()) - HELD_OUT) // PROMPTS_PER_SEED


def prompt(question: str) -> str:
    """The question as SmolLM2 reads it, without the system message that its chat template adds by itself."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
