/*
 * What a page holds. One word says it all, so that it is stored and loaded in one piece:
 *
 *   generation 29 | id 4 | page 19 | checksum 12
 *
 * An owned page is stored by one process only. It raises intent[page], stores, and raises
 * done[page]. So whoever reads done, then the page, then intent, must find done <= page <= intent:
 * less is a lost store or a stale translation, more or another id is foreign content.
 */
#include <time.h>
#include "storm.h"

uint64_t microseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
	return x ^ (x >> 31);
}

uint64_t draw(uint64_t *state, uint64_t below)
{
	*state = mix(*state);
	return (*state >> 16) % below;
}

uint64_t stamp(unsigned int id, unsigned long page, uint64_t generation)
{
	uint64_t value = generation << 23 | (uint64_t)id << 19 | page;

	return value << 12 | (mix(value) & 0xfff);
}

bool genuine(uint64_t value, unsigned int id, unsigned long page)
{
	return value == stamp(id, page, generation(value));
}

uint64_t generation(uint64_t value)
{
	return value >> 35;
}
